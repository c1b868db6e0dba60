//! The XDP program, emitted as instructions: no compiler and no object file.
//!
//! What it does: a frame that the [`FrameFilter`] wants is redirected to the AF_XDP socket of the queue it came in on, or,
//! where there are several on a queue, to the one of its destination's lane; everything else, and everything on a queue
//! without a socket, goes to the host as before. It never drops. The
//! instruction set is that of Documentation/bpf/standardization/instruction-set.rst.

use crate::frame_filter::{FrameFilter, TAG_BYTES, TAG_PROTOCOL, VLAN_ID_MASK};
use crate::sys::BpfInsn;

/// `XDP_PASS` of include/uapi/linux/bpf.h.
pub(crate) const XDP_PASS: i32 = 2;
/// `BPF_FUNC_map_lookup_elem` of include/uapi/linux/bpf.h.
const HELPER_LOOKUP: i32 = 1;
/// `BPF_FUNC_redirect_map` of include/uapi/linux/bpf.h.
const HELPER_REDIRECT_MAP: i32 = 51;
/// Offsets in `struct xdp_md`.
const CONTEXT_DATA: i16 = 0;
const CONTEXT_DATA_END: i16 = 4;
const CONTEXT_RX_QUEUE: i16 = 16;
/// What a tag moves the rest of the frame by.
const TAG: i16 = TAG_BYTES as i16;
/// Where the EtherType is in an untagged frame; a tag takes its place.
const ETHERTYPE_OFFSET: i16 = 12;
/// Where what follows the EtherType starts in an untagged frame.
const PAYLOAD_OFFSET: i16 = 14;
/// Where the tag's control information is.
const TAG_OFFSET: i16 = 14;

/// A register of the eBPF machine; `R0` is the result, `R1` to `R5` are arguments, `R6` and `R7` survive calls, `R10` is the
/// end of the stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Register {
    R0 = 0,
    R1 = 1,
    R2 = 2,
    R3 = 3,
    R4 = 4,
    R5 = 5,
    R6 = 6,
    R7 = 7,
    R10 = 10,
}

/// How many bytes a load reads.
#[derive(Debug, Clone, Copy)]
enum Width {
    U8,
    U16,
    U32,
}

/// Instruction codes: class, source and operation together.
mod code {
    pub(super) const MOV_REGISTER: u8 = 0xbf;
    pub(super) const MOV_IMMEDIATE: u8 = 0xb7;
    pub(super) const ADD_IMMEDIATE: u8 = 0x07;
    pub(super) const ADD_REGISTER: u8 = 0x0f;
    pub(super) const AND_IMMEDIATE: u8 = 0x57;
    pub(super) const LOAD_U32: u8 = 0x61;
    pub(super) const LOAD_U16: u8 = 0x69;
    pub(super) const LOAD_U8: u8 = 0x71;
    pub(super) const STORE_U32: u8 = 0x63;
    pub(super) const LOAD_IMMEDIATE_64: u8 = 0x18;
    pub(super) const JUMP: u8 = 0x05;
    pub(super) const JUMP_EQUAL_IMMEDIATE: u8 = 0x15;
    pub(super) const JUMP_GREATER_REGISTER: u8 = 0x2d;
    pub(super) const JUMP_GREATER_EQUAL_IMMEDIATE: u8 = 0x35;
    pub(super) const JUMP_ANY_BIT_IMMEDIATE: u8 = 0x45;
    pub(super) const JUMP_NOT_EQUAL_IMMEDIATE: u8 = 0x55;
    pub(super) const CALL: u8 = 0x85;
    pub(super) const EXIT: u8 = 0x95;
}
/// Source register value of `LOAD_IMMEDIATE_64` that makes the immediate a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

/// Where jumps go. All are forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Label {
    Untagged,
    Tagged,
    Redirect,
    Unknown,
    Pass,
}

/// Emits instructions, with forward jumps to labels.
#[derive(Debug, Default)]
struct Assembler {
    instructions: Vec<BpfInsn>,
    /// Jumps to labels that are bound later.
    open_jumps: Vec<(usize, Label)>,
}

impl Assembler {
    fn emit(&mut self, code: u8, target: Register, source: u8, offset: i16, immediate: i32) {
        let registers = target as u8 | source << 4;
        self.instructions.push(BpfInsn { code, registers, offset, immediate });
    }

    fn copy(&mut self, target: Register, source: Register) {
        self.emit(code::MOV_REGISTER, target, source as u8, 0, 0);
    }

    fn set(&mut self, target: Register, value: i32) {
        self.emit(code::MOV_IMMEDIATE, target, 0, 0, value);
    }

    fn add(&mut self, target: Register, value: i32) {
        self.emit(code::ADD_IMMEDIATE, target, 0, 0, value);
    }

    fn add_register(&mut self, target: Register, source: Register) {
        self.emit(code::ADD_REGISTER, target, source as u8, 0, 0);
    }

    fn and(&mut self, target: Register, value: i32) {
        self.emit(code::AND_IMMEDIATE, target, 0, 0, value);
    }

    fn load(&mut self, width: Width, target: Register, source: Register, offset: i16) {
        let code = match width {
            Width::U8 => code::LOAD_U8,
            Width::U16 => code::LOAD_U16,
            Width::U32 => code::LOAD_U32,
        };
        self.emit(code, target, source as u8, offset, 0);
    }

    fn store_u32(&mut self, target: Register, offset: i16, source: Register) {
        self.emit(code::STORE_U32, target, source as u8, offset, 0);
    }

    fn load_map(&mut self, target: Register, map_fd: i32) {
        self.emit(code::LOAD_IMMEDIATE_64, target, PSEUDO_MAP_FD, 0, map_fd);
        self.emit(0, Register::R0, 0, 0, 0);
    }

    fn jump(&mut self, label: Label) {
        self.jump_if(code::JUMP, Register::R0, 0, 0, label);
    }

    fn jump_if(&mut self, code: u8, left: Register, source: u8, value: i32, label: Label) {
        self.open_jumps.push((self.instructions.len(), label));
        self.emit(code, left, source, 0, value);
    }

    /// Goes to [`Label::Pass`] where the frame has not that many bytes.
    fn require_bytes(&mut self, bytes: i16) {
        use Register::{R2, R3, R4};
        self.copy(R4, R2);
        self.add(R4, i32::from(bytes));
        self.jump_if(code::JUMP_GREATER_REGISTER, R4, R3 as u8, 0, Label::Pass);
    }

    /// Makes the open jumps to `label` go to the next instruction.
    fn bind(&mut self, label: Label) {
        let here = self.instructions.len();
        for (jump, _) in self.open_jumps.extract_if(.., |(_, to)| *to == label) {
            let distance = here - jump - 1;
            self.instructions[jump].offset = i16::try_from(distance).expect("the program is short");
        }
    }

    fn call(&mut self, helper: i32) {
        self.emit(code::CALL, Register::R0, 0, 0, helper);
    }

    fn exit(&mut self) {
        self.emit(code::EXIT, Register::R0, 0, 0, 0);
    }

    fn finish(self) -> Vec<BpfInsn> {
        assert!(self.open_jumps.is_empty(), "every jump was bound");
        self.instructions
    }
}

/// Goes on with the frames that `filter` wants: `R6` is the context, `R2` the frame's first byte. All others go to
/// [`Label::Pass`].
fn select(asm: &mut Assembler, filter: &FrameFilter) {
    use Register::{R1, R2, R3, R5, R6};
    asm.copy(R6, R1);
    asm.load(Width::U32, R2, R6, CONTEXT_DATA);
    asm.load(Width::U32, R3, R6, CONTEXT_DATA_END);
    asm.require_bytes(PAYLOAD_OFFSET + 1);
    asm.load(Width::U16, R5, R2, ETHERTYPE_OFFSET);
    if filter.untagged {
        asm.jump_if(code::JUMP_EQUAL_IMMEDIATE, R5, 0, on_wire(filter.ethertype), Label::Untagged);
    }
    asm.jump_if(code::JUMP_NOT_EQUAL_IMMEDIATE, R5, 0, on_wire(TAG_PROTOCOL), Label::Pass);
    asm.require_bytes(PAYLOAD_OFFSET + TAG + 1);
    asm.load(Width::U16, R5, R2, ETHERTYPE_OFFSET + TAG);
    asm.jump_if(code::JUMP_NOT_EQUAL_IMMEDIATE, R5, 0, on_wire(filter.ethertype), Label::Pass);
    asm.load(Width::U16, R5, R2, TAG_OFFSET);
    asm.and(R5, on_wire(VLAN_ID_MASK));
    for vlan in filter.vlan_ids() {
        asm.jump_if(code::JUMP_EQUAL_IMMEDIATE, R5, 0, on_wire(vlan), Label::Tagged);
    }
    asm.jump(Label::Pass);
    asm.bind(Label::Tagged);
    let rejected = i32::from(filter.rejected_flags);
    asm.load(Width::U8, R5, R2, PAYLOAD_OFFSET + TAG);
    asm.jump_if(code::JUMP_ANY_BIT_IMMEDIATE, R5, 0, rejected, Label::Pass);
    asm.jump(Label::Redirect);
    if filter.untagged {
        asm.bind(Label::Untagged);
        asm.load(Width::U8, R5, R2, PAYLOAD_OFFSET);
        asm.jump_if(code::JUMP_ANY_BIT_IMMEDIATE, R5, 0, rejected, Label::Pass);
    }
    asm.bind(Label::Redirect);
}

/// Ends the program: redirects to the socket at place `R2` of a map, and passes what jumped to [`Label::Pass`].
fn redirect(asm: &mut Assembler, map_fd: i32) {
    use Register::{R0, R1, R3};
    asm.load_map(R1, map_fd);
    // The lowest bits of the flags are what a missing socket gives.
    asm.set(R3, XDP_PASS);
    asm.call(HELPER_REDIRECT_MAP);
    asm.exit();
    asm.bind(Label::Pass);
    asm.set(R0, XDP_PASS);
    asm.exit();
}

/// What a 16-bit load gives for a number that the wire has in network order.
fn on_wire(number: u16) -> i32 {
    i32::from(number.to_be())
}

/// An XDP program, not yet loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    instructions: Vec<BpfInsn>,
}

impl Program {
    /// Redirects the frames that `filter` wants to the socket that the map of descriptor `map_fd` holds for their
    /// receive queue, and passes everything else.
    pub(crate) fn redirect_by_queue(filter: &FrameFilter, map_fd: i32) -> Self {
        use Register::{R2, R6};
        let mut asm = Assembler::default();
        select(&mut asm, filter);
        asm.load(Width::U32, R2, R6, CONTEXT_RX_QUEUE);
        redirect(&mut asm, map_fd);
        Self { instructions: asm.finish() }
    }

    /// Redirects the frames that `filter` wants to the socket that the map of descriptor `sockets_fd` holds at their receive
    /// queue's number, and further on by what the map of descriptor `addresses_fd` holds for their destination. Passes
    /// everything else, and what comes by none of the first `queues` queues.
    pub(crate) fn redirect_by_address(
        filter: &FrameFilter,
        sockets_fd: i32,
        addresses_fd: i32,
        queues: u32,
    ) -> Self {
        use Register::{R0, R1, R2, R5, R6, R7, R10};
        let mut asm = Assembler::default();
        select(&mut asm, filter);
        // The key, as `address_key` makes it.
        asm.load(Width::U32, R5, R2, 0);
        asm.store_u32(R10, -8, R5);
        asm.load(Width::U16, R5, R2, 4);
        asm.store_u32(R10, -4, R5);
        asm.load_map(R1, addresses_fd);
        asm.copy(R2, R10);
        asm.add(R2, -8);
        asm.call(HELPER_LOOKUP);
        asm.set(R7, 0);
        asm.jump_if(code::JUMP_EQUAL_IMMEDIATE, R0, 0, 0, Label::Unknown);
        asm.load(Width::U32, R7, R0, 0);
        asm.bind(Label::Unknown);
        asm.load(Width::U32, R2, R6, CONTEXT_RX_QUEUE);
        // A queue that came later has no places: its number is that of another lane.
        let queues = i32::try_from(queues).expect("queue counts have 16 bits");
        asm.jump_if(code::JUMP_GREATER_EQUAL_IMMEDIATE, R2, 0, queues, Label::Pass);
        asm.add_register(R2, R7);
        redirect(&mut asm, sockets_fd);
        Self { instructions: asm.finish() }
    }

    pub(crate) fn instructions(&self) -> &[BpfInsn] {
        &self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::{AddressMap, LoadedProgram, XskMap, address_key};
    use crate::frame_filter::tests::{aoe, tagged_frame};
    use crate::nic::Nic;
    use crate::region::{Region, RegionConfig};
    use crate::socket::SocketBuilder;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    const AOE: u16 = 0x88a2;
    const MAP_FD: i32 = 77;
    const DATA: u64 = 0x1_0000;
    const CONTEXT: u64 = 0x9_0000;
    const STACK_END: u64 = 0xa_0000;
    const VALUE: u64 = 0xb_0000;
    const ADDRESSES_FD: i32 = 78;

    /// What the program asked for.
    #[derive(Debug, PartialEq, Eq)]
    enum Outcome {
        Return(u64),
        Redirect { map: u64, key: u64, flags: u64 },
    }

    /// Runs a program on a frame: the subset of the machine that programs here use, with every access
    /// checked. The redirection ends the run, because its result is the program's. `lookup` is the map of addresses.
    fn interpret(
        program: &[BpfInsn],
        frame: &[u8],
        queue: u32,
        lookup: impl Fn([u8; 8]) -> Option<u32>,
    ) -> Outcome {
        let end = DATA + frame.len() as u64;
        let context = |offset: u64| match offset {
            0 => DATA,
            4 => end,
            16 => u64::from(queue),
            _ => panic!("read of context field {offset}"),
        };
        let mut registers = [0u64; 11];
        registers[1] = CONTEXT;
        registers[10] = STACK_END;
        let (mut stack, mut value) = ([None; 8], 0);
        let mut at = 0;
        let mut called = None;
        loop {
            let instruction = program[at];
            let target = usize::from(instruction.registers & 15);
            let source = usize::from(instruction.registers >> 4);
            let immediate = i64::from(instruction.immediate).cast_unsigned();
            let jump = at.strict_add_signed(isize::from(instruction.offset));
            match instruction.code {
                0x05 => at = jump,
                0xbf => registers[target] = registers[source],
                0xb7 => registers[target] = immediate,
                0x07 => registers[target] = registers[target].wrapping_add(immediate),
                0x0f => registers[target] = registers[target].wrapping_add(registers[source]),
                0x57 => registers[target] &= immediate,
                0x63 => {
                    let at = registers[target].strict_add_signed(instruction.offset.into());
                    let at = usize::try_from(at - (STACK_END - 8)).unwrap();
                    let word = u32::try_from(registers[source]).unwrap().to_ne_bytes();
                    stack[at..at + 4].copy_from_slice(&word.map(Some));
                }
                0x61 if registers[source] == CONTEXT => {
                    registers[target] = context(u64::try_from(instruction.offset).unwrap());
                }
                0x61 if registers[source] == VALUE => registers[target] = u64::from(value),
                code @ (0x61 | 0x69 | 0x71) => {
                    let bytes = match code {
                        0x61 => 4,
                        0x69 => 2,
                        _ => 1,
                    };
                    let start = registers[source].strict_add_signed(instruction.offset.into());
                    assert!(start >= DATA && start + bytes <= end, "read outside the frame");
                    let at = usize::try_from(start - DATA).unwrap();
                    registers[target] = match bytes {
                        4 => u64::from(u32::from_ne_bytes(frame[at..at + 4].try_into().unwrap())),
                        2 => u64::from(u16::from_ne_bytes([frame[at], frame[at + 1]])),
                        _ => u64::from(frame[at]),
                    };
                }
                0x18 => {
                    assert_eq!(source, 1, "a map's descriptor");
                    registers[target] = immediate;
                    at += 1;
                }
                0x2d if registers[target] > registers[source] => at = jump,
                0x15 if registers[target] == immediate => at = jump,
                0x45 if registers[target] & immediate != 0 => at = jump,
                0x35 if registers[target] >= immediate => at = jump,
                0x55 if registers[target] != immediate => at = jump,
                0x2d | 0x15 | 0x35 | 0x45 | 0x55 => {}
                0x85 if instruction.immediate == 1 => {
                    assert_eq!((registers[1], registers[2]), (78, STACK_END - 8), "map and key");
                    let key = stack.map(|byte| byte.expect("the key was written"));
                    let found = lookup(key);
                    value = found.unwrap_or(0);
                    registers[0] = found.map_or(0, |_| VALUE);
                    registers[1..6].fill(0xdead_dead_dead);
                }
                0x85 => {
                    assert_eq!(instruction.immediate, 51);
                    called =
                        Some(Outcome::Redirect { map: registers[1], key: registers[2], flags: registers[3] });
                }
                0x95 => return called.unwrap_or(Outcome::Return(registers[0])),
                other => panic!("instruction {other:#x}"),
            }
            at += 1;
        }
    }

    fn run(filter: &FrameFilter, frame: &[u8], queue: u32) -> Outcome {
        let nothing = |_| panic!("no addresses are looked up");
        interpret(Program::redirect_by_queue(filter, MAP_FD).instructions(), frame, queue, nothing)
    }

    fn is_redirected(filter: &FrameFilter, frame: &[u8]) -> bool {
        run(filter, frame, 3) == Outcome::Redirect { map: 77, key: 3, flags: 2 }
    }

    /// A request of our EtherType, or what else the type says.
    fn frame_of(ethertype: [u8; 2], len: usize) -> Vec<u8> {
        let mut frame = vec![0xe0; len];
        frame[12..14].copy_from_slice(&ethertype);
        frame
    }

    #[test]
    fn an_aoe_frame_goes_to_the_socket_of_its_queue() {
        for queue in [0, 1, 63] {
            for len in [15, 36, 1060, 3498] {
                assert_eq!(
                    run(&aoe(), &frame_of([0x88, 0xa2], len), queue),
                    Outcome::Redirect { map: 77, key: u64::from(queue), flags: 2 }
                );
            }
        }
    }

    #[test]
    fn other_frames_pass() {
        for ethertype in [[0x08, 0x00], [0x08, 0x06], [0x86, 0xdd], [0xa2, 0x88], [0x88, 0xa1]] {
            assert_eq!(run(&aoe(), &frame_of(ethertype, 60), 0), Outcome::Return(2));
        }
    }

    #[test]
    fn runts_pass() {
        for len in 0..15 {
            assert_eq!(run(&aoe(), &vec![0x88; len], 0), Outcome::Return(2));
        }
        let tagged = tagged_frame(7, 0);
        let filter = FrameFilter { vlans: vec![7], ..aoe() };
        for len in 15..19 {
            assert!(!is_redirected(&filter, &tagged[..len]), "{len} bytes");
        }
        assert!(is_redirected(&filter, &tagged[..19]));
    }

    /// What steering on an interface of `queues` queues makes of a frame, with one address that has a lane.
    fn steer(
        filter: &FrameFilter,
        frame: &[u8],
        queue: u32,
        queues: u32,
        known: [u8; 6],
        lane: u32,
    ) -> Outcome {
        let program = Program::redirect_by_address(filter, MAP_FD, ADDRESSES_FD, queues);
        let lookup = |key| (key == address_key(known)).then_some(lane * queues);
        interpret(program.instructions(), frame, queue, lookup)
    }

    #[test]
    fn a_frame_goes_to_its_destinations_lane_on_its_queue() {
        let known = [0x02, 0xaa, 1, 2, 3, 0x10];
        let filter = FrameFilter { vlans: vec![7], ..aoe() };
        let place = |key| Outcome::Redirect { map: 77, key, flags: 2 };
        for mut frame in [frame_of([0x88, 0xa2], 60), frame_of([0x88, 0xa2], 15), tagged_frame(7, 0)] {
            frame[..6].copy_from_slice(&known);
            for queue in 0..4 {
                assert_eq!(steer(&filter, &frame, queue, 4, known, 3), place(12 + u64::from(queue)));
            }
            assert_eq!(steer(&filter, &frame, 4, 4, known, 3), Outcome::Return(2), "a queue that came later");
            for at in 0..6 {
                let mut other = frame.clone();
                other[at] ^= 0x10;
                assert_eq!(steer(&filter, &other, 2, 4, known, 3), place(2), "byte {at}");
            }
        }
    }

    proptest! {
        /// What the filter's own definition says, for frames that are almost or wholly ours.
        #[test]
        fn the_program_does_what_the_filter_says(
            mut frame in proptest::collection::vec(any::<u8>(), 0..80),
            kind in 0u8..4,
            vid in prop_oneof![Just(0u16), Just(5), Just(100), 0u16..4096],
            untagged: bool,
            vlans in proptest::sample::subsequence(vec![1u16, 5, 100, 4094], 0..=4),
            rejected_flags in prop_oneof![Just(0u8), Just(8)],
        ) {
            if frame.len() >= 14 && kind == 1 {
                frame[12..14].copy_from_slice(&[0x88, 0xa2]);
            }
            if frame.len() >= 18 && kind > 1 {
                frame[12..14].copy_from_slice(&[0x81, 0x00]);
                frame[14] = frame[14] & 0xf0 | vid.to_be_bytes()[0];
                frame[15] = vid.to_be_bytes()[1];
                if kind == 3 {
                    frame[16..18].copy_from_slice(&[0x88, 0xa2]);
                }
            }
            let filter = FrameFilter { ethertype: AOE, untagged, vlans, rejected_flags };
            prop_assert_eq!(is_redirected(&filter, &frame), filter.wants(&frame));
            let steered = steer(&filter, &frame, 3, 4, [0; 6], 1);
            prop_assert_eq!(steered != Outcome::Return(2), filter.wants(&frame));
        }
    }

    /// The same bytes, run by the kernel. Needs root; without it the verifier has nothing to say.
    #[test]
    fn the_kernel_runs_it_as_the_interpreter_does() {
        let map = match XskMap::new(4) {
            Ok(map) => map,
            Err(error) => {
                assert!(error.missing_capability().is_some(), "unexpected failure: {error}");
                eprintln!("skipped: {error}");
                return;
            }
        };
        let filter = FrameFilter { vlans: vec![5, 6], rejected_flags: 8, ..aoe() };
        let program = LoadedProgram::load(&filter, &map).expect("the verifier accepts the program");
        let cases = [
            (frame_of([0x88, 0xa2], 60), "no socket in the map: the host gets it"),
            (frame_of([0x08, 0x00], 60), "not ours"),
            (tagged_frame(5, 0), "no socket in the map, tagged"),
            (tagged_frame(7, 0), "another VLAN"),
        ];
        for (frame, why) in cases {
            let result = program.test_run(&frame).expect("a test run works where loading did");
            assert_eq!(result, XDP_PASS.cast_unsigned(), "{why}");
        }
    }

    /// With a socket in the map, on the loopback's receive queue 0 that test runs use.
    #[test]
    fn the_kernel_redirects_to_a_socket_of_the_queue() {
        const XDP_REDIRECT: u32 = 4;
        crate::netns::isolated("program::tests::the_kernel_redirects_to_a_socket_of_the_queue", || {
            crate::netns::veth_pair(1500, 1);
            let config = RegionConfig { cores: 1, chunks_per_core: 16, headers_per_core: 64 };
            let region = Region::new(config).unwrap();
            let index = Nic::open("a0").unwrap().index();
            let socket = SocketBuilder::new().ring_entries(64).bind(&region, index, 0).unwrap();
            let map = XskMap::new(1).unwrap();
            let filter = FrameFilter { vlans: vec![5, 6], rejected_flags: 8, ..aoe() };
            let program = LoadedProgram::load(&filter, &map).unwrap();
            let ours = frame_of([0x88, 0xa2], 60);
            assert_eq!(program.test_run(&ours).unwrap(), XDP_PASS.cast_unsigned());
            map.set(0, socket.as_fd()).unwrap();
            let mut response = ours.clone();
            response[14] |= 8;
            let cases = [
                (ours, XDP_REDIRECT),
                (response, XDP_PASS.cast_unsigned()),
                (frame_of([0x08, 0x00], 60), XDP_PASS.cast_unsigned()),
                (tagged_frame(0, 0), XDP_REDIRECT),
                (tagged_frame(6, 0), XDP_REDIRECT),
                (tagged_frame(6, 8), XDP_PASS.cast_unsigned()),
                (tagged_frame(7, 0), XDP_PASS.cast_unsigned()),
            ];
            for (frame, expected) in cases {
                assert_eq!(program.test_run(&frame).unwrap(), expected, "{:x?}", &frame[12..20]);
            }
        });
    }

    /// In the kernel: only an address whose lane has a socket is redirected, until its lane is taken away.
    #[test]
    fn the_kernel_redirects_to_the_lane_of_an_address() {
        const XDP_REDIRECT: u32 = 4;
        crate::netns::isolated("program::tests::the_kernel_redirects_to_the_lane_of_an_address", || {
            crate::netns::veth_pair(1500, 1);
            let config = RegionConfig { cores: 1, chunks_per_core: 16, headers_per_core: 64 };
            let region = Region::new(config).unwrap();
            let index = Nic::open("a0").unwrap().index();
            let socket = SocketBuilder::new().ring_entries(64).bind(&region, index, 0).unwrap();
            let addresses = AddressMap::new(2, 1).unwrap();
            let map = XskMap::new(3).unwrap();
            let filter = FrameFilter { vlans: vec![5], ..aoe() };
            let program = LoadedProgram::load_steering(&filter, &map, &addresses).unwrap();
            map.set(addresses.place(2, 0), socket.as_fd()).unwrap();
            let run = |frame: &[u8]| program.test_run(frame).unwrap();
            let to = |mac: [u8; 6], mut frame: Vec<u8>| {
                frame[..6].copy_from_slice(&mac);
                frame
            };
            let macs = [1, 2, 3].map(|last| [0x02, 0xaa, 0, 0, 0, last]);
            addresses.set(macs[0], 2).unwrap();
            addresses.set(macs[1], 1).unwrap();
            let full = addresses.set(macs[2], 2).unwrap_err();
            assert_eq!(full.errno(), Some(libc::E2BIG), "{full}");
            for frame in [frame_of([0x88, 0xa2], 60), tagged_frame(5, 0)] {
                assert_eq!(run(&to(macs[0], frame.clone())), XDP_REDIRECT);
                assert_eq!(
                    run(&to(macs[1], frame.clone())),
                    XDP_PASS.cast_unsigned(),
                    "a lane without a socket"
                );
                assert_eq!(
                    run(&to(macs[2], frame.clone())),
                    XDP_PASS.cast_unsigned(),
                    "lane 0 has no socket here"
                );
            }
            assert_eq!(run(&to(macs[0], tagged_frame(6, 0))), XDP_PASS.cast_unsigned());
            addresses.set(macs[1], 2).unwrap();
            assert_eq!(run(&to(macs[1], frame_of([0x88, 0xa2], 60))), XDP_REDIRECT, "it has moved");
            addresses.remove(macs[0]).unwrap();
            assert_eq!(run(&to(macs[0], frame_of([0x88, 0xa2], 60))), XDP_PASS.cast_unsigned());
            assert_eq!(addresses.remove(macs[0]).unwrap_err().errno(), Some(libc::ENOENT));
            map.set(addresses.place(0, 0), socket.as_fd()).unwrap();
            assert_eq!(run(&to(macs[0], frame_of([0x88, 0xa2], 60))), XDP_REDIRECT, "lane 0");
        });
    }
}
