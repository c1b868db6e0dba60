//! The XDP program, emitted as instructions: no compiler and no object file.
//!
//! What it does: a frame of our EtherType, untagged, is redirected to the AF_XDP socket of the queue it
//! came in on; everything else, and everything on a queue without a socket, goes to the host as before.
//! It never drops. The instruction set is that of Documentation/bpf/standardization/instruction-set.rst.

use crate::sys::BpfInsn;

/// `XDP_PASS` of include/uapi/linux/bpf.h.
pub(crate) const XDP_PASS: i32 = 2;
/// `BPF_FUNC_redirect_map` of include/uapi/linux/bpf.h.
const HELPER_REDIRECT_MAP: i32 = 51;
/// Offsets in `struct xdp_md`.
const CONTEXT_DATA: i16 = 0;
const CONTEXT_DATA_END: i16 = 4;
const CONTEXT_RX_QUEUE: i16 = 16;
/// Where the EtherType is in an untagged frame, and the length of the header that ends with it.
const ETHERTYPE_OFFSET: i16 = 12;
const ETHERNET_BYTES: i32 = 14;

/// A register of the eBPF machine; `R0` is the result, `R1` to `R5` are arguments, `R6` survives calls.
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
}

/// How many bytes a load reads.
#[derive(Debug, Clone, Copy)]
enum Width {
    U16,
    U32,
}

/// Instruction codes: class, source and operation together.
mod code {
    pub(super) const MOV_REGISTER: u8 = 0xbf;
    pub(super) const MOV_IMMEDIATE: u8 = 0xb7;
    pub(super) const ADD_IMMEDIATE: u8 = 0x07;
    pub(super) const LOAD_U32: u8 = 0x61;
    pub(super) const LOAD_U16: u8 = 0x69;
    pub(super) const LOAD_IMMEDIATE_64: u8 = 0x18;
    pub(super) const JUMP_GREATER_REGISTER: u8 = 0x2d;
    pub(super) const JUMP_NOT_EQUAL_IMMEDIATE: u8 = 0x55;
    pub(super) const CALL: u8 = 0x85;
    pub(super) const EXIT: u8 = 0x95;
}
/// Source register value of `LOAD_IMMEDIATE_64` that makes the immediate a map's descriptor.
const PSEUDO_MAP_FD: u8 = 1;

/// Emits instructions, with forward jumps to one label.
#[derive(Debug, Default)]
struct Assembler {
    instructions: Vec<BpfInsn>,
    /// Jumps to the label that is bound later.
    open_jumps: Vec<usize>,
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

    fn load(&mut self, width: Width, target: Register, source: Register, offset: i16) {
        let code = match width {
            Width::U16 => code::LOAD_U16,
            Width::U32 => code::LOAD_U32,
        };
        self.emit(code, target, source as u8, offset, 0);
    }

    fn load_map(&mut self, target: Register, map_fd: i32) {
        self.emit(code::LOAD_IMMEDIATE_64, target, PSEUDO_MAP_FD, 0, map_fd);
        self.emit(0, Register::R0, 0, 0, 0);
    }

    fn jump_if_greater(&mut self, left: Register, right: Register) {
        self.open_jumps.push(self.instructions.len());
        self.emit(code::JUMP_GREATER_REGISTER, left, right as u8, 0, 0);
    }

    fn jump_unless_equal(&mut self, left: Register, value: i32) {
        self.open_jumps.push(self.instructions.len());
        self.emit(code::JUMP_NOT_EQUAL_IMMEDIATE, left, 0, 0, value);
    }

    /// Makes all open jumps go to the next instruction.
    fn bind(&mut self) {
        let here = self.instructions.len();
        for jump in self.open_jumps.drain(..) {
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

/// An XDP program, not yet loaded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Program {
    instructions: Vec<BpfInsn>,
}

impl Program {
    /// Redirects untagged frames of `ethertype` to the socket that the map of descriptor `map_fd` holds
    /// for their receive queue, and passes everything else.
    pub(crate) fn redirect_by_queue(ethertype: u16, map_fd: i32) -> Self {
        use Register::{R0, R1, R2, R3, R4, R5, R6};
        let mut asm = Assembler::default();
        asm.copy(R6, R1);
        asm.load(Width::U32, R2, R6, CONTEXT_DATA);
        asm.load(Width::U32, R3, R6, CONTEXT_DATA_END);
        asm.copy(R4, R2);
        asm.add(R4, ETHERNET_BYTES);
        asm.jump_if_greater(R4, R3);
        asm.load(Width::U16, R5, R2, ETHERTYPE_OFFSET);
        // The load reads in host order what the wire has in network order.
        asm.jump_unless_equal(R5, i32::from(ethertype.to_be()));
        asm.load_map(R1, map_fd);
        asm.load(Width::U32, R2, R6, CONTEXT_RX_QUEUE);
        // The lowest bits of the flags are what a missing socket gives.
        asm.set(R3, XDP_PASS);
        asm.call(HELPER_REDIRECT_MAP);
        asm.exit();
        asm.bind();
        asm.set(R0, XDP_PASS);
        asm.exit();
        Self { instructions: asm.finish() }
    }

    pub(crate) fn instructions(&self) -> &[BpfInsn] {
        &self.instructions
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bpf::{LoadedProgram, XskMap};
    use crate::nic::Nic;
    use crate::region::{Region, RegionConfig};
    use crate::socket::SocketBuilder;
    use proptest::prelude::*;
    use std::os::fd::AsFd;

    const AOE: u16 = 0x88a2;
    const MAP_FD: i32 = 77;
    const DATA: u64 = 0x1_0000;
    const CONTEXT: u64 = 0x9_0000;

    /// What the program asked for.
    #[derive(Debug, PartialEq, Eq)]
    enum Outcome {
        Return(u64),
        Redirect { map: u64, key: u64, flags: u64 },
    }

    /// Runs a program on a frame: the subset of the machine that programs here use, with every access
    /// checked. The helper ends the run, because its result is the program's.
    fn interpret(program: &[BpfInsn], frame: &[u8], queue: u32) -> Outcome {
        let end = DATA + frame.len() as u64;
        let context = |offset: u64| match offset {
            0 => DATA,
            4 => end,
            16 => u64::from(queue),
            _ => panic!("read of context field {offset}"),
        };
        let mut registers = [0u64; 11];
        registers[1] = CONTEXT;
        let mut at = 0;
        let mut called = None;
        loop {
            let instruction = program[at];
            let target = usize::from(instruction.registers & 15);
            let source = usize::from(instruction.registers >> 4);
            let immediate = i64::from(instruction.immediate).cast_unsigned();
            let jump = at.strict_add_signed(isize::from(instruction.offset));
            match instruction.code {
                0xbf => registers[target] = registers[source],
                0xb7 => registers[target] = immediate,
                0x07 => registers[target] = registers[target].wrapping_add(immediate),
                0x61 => {
                    let offset = registers[source].strict_add_signed(instruction.offset.into()) - CONTEXT;
                    registers[target] = context(offset);
                }
                0x69 => {
                    let start = registers[source].strict_add_signed(instruction.offset.into());
                    assert!(start >= DATA && start + 2 <= end, "read outside the frame");
                    let at = usize::try_from(start - DATA).unwrap();
                    registers[target] = u64::from(u16::from_ne_bytes([frame[at], frame[at + 1]]));
                }
                0x18 => {
                    assert_eq!(source, 1, "a map's descriptor");
                    registers[target] = immediate;
                    at += 1;
                }
                0x2d if registers[target] > registers[source] => at = jump,
                0x55 if registers[target] != immediate => at = jump,
                0x2d | 0x55 => {}
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

    fn run(frame: &[u8], queue: u32) -> Outcome {
        interpret(Program::redirect_by_queue(AOE, MAP_FD).instructions(), frame, queue)
    }

    fn frame_of(ethertype: [u8; 2], len: usize) -> Vec<u8> {
        let mut frame = vec![0xee; len];
        frame[12..14].copy_from_slice(&ethertype);
        frame
    }

    #[test]
    fn an_aoe_frame_goes_to_the_socket_of_its_queue() {
        for queue in [0, 1, 63] {
            for len in [14, 36, 1060, 3498] {
                assert_eq!(
                    run(&frame_of([0x88, 0xa2], len), queue),
                    Outcome::Redirect { map: 77, key: u64::from(queue), flags: 2 }
                );
            }
        }
    }

    #[test]
    fn other_frames_pass() {
        for ethertype in [[0x08, 0x00], [0x08, 0x06], [0x86, 0xdd], [0xa2, 0x88], [0x88, 0xa1]] {
            assert_eq!(run(&frame_of(ethertype, 60), 0), Outcome::Return(2));
        }
    }

    #[test]
    fn tagged_frames_pass() {
        let mut frame = frame_of([0x81, 0x00], 64);
        frame[16..18].copy_from_slice(&[0x88, 0xa2]);
        assert_eq!(run(&frame, 0), Outcome::Return(2));
    }

    #[test]
    fn runts_pass() {
        for len in 0..14 {
            assert_eq!(run(&vec![0x88; len], 0), Outcome::Return(2));
        }
    }

    proptest! {
        #[test]
        fn any_bytes_pass_or_are_redirected(
            mut frame in proptest::collection::vec(any::<u8>(), 0..80),
            ours in any::<bool>(),
        ) {
            if ours && frame.len() >= 14 {
                frame[12..14].copy_from_slice(&[0x88, 0xa2]);
            }
            let is_ours = frame.get(12..14) == Some(&[0x88, 0xa2]);
            let redirected = run(&frame, 3) != Outcome::Return(2);
            prop_assert_eq!(redirected, is_ours);
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
        let program = LoadedProgram::load(AOE, &map).expect("the verifier accepts the program");
        let cases = [
            (frame_of([0x88, 0xa2], 60), "no socket in the map: the host gets it"),
            (frame_of([0x08, 0x00], 60), "not ours"),
            (frame_of([0x81, 0x00], 1500), "tagged"),
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
            let program = LoadedProgram::load(AOE, &map).unwrap();
            let (ours, other) = (frame_of([0x88, 0xa2], 60), frame_of([0x08, 0x00], 60));
            assert_eq!(program.test_run(&ours).unwrap(), XDP_PASS.cast_unsigned());
            map.set(0, socket.as_fd()).unwrap();
            assert_eq!(program.test_run(&ours).unwrap(), XDP_REDIRECT);
            assert_eq!(program.test_run(&other).unwrap(), XDP_PASS.cast_unsigned());
        });
    }
}
