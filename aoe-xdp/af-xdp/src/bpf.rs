//! The bpf(2) calls: a map of sockets, one of addresses, a loaded program, and the link that attaches it to an interface.
//!
//! Each is a file descriptor owned by this process. When the link's is closed, by drop or by the end of
//! the process, the kernel detaches the program; so a crash leaves nothing behind.

use std::ffi::CStr;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Capability, Error};
use crate::frame_filter::FrameFilter;
use crate::program::Program;

// Commands, types and flags of include/uapi/linux/bpf.h and if_link.h.
const BPF_MAP_CREATE: i32 = 0;
const BPF_MAP_UPDATE_ELEM: i32 = 2;
const BPF_MAP_DELETE_ELEM: i32 = 3;
const BPF_PROG_LOAD: i32 = 5;
#[cfg(test)]
const BPF_PROG_TEST_RUN: i32 = 10;
const BPF_LINK_CREATE: i32 = 28;
const BPF_MAP_TYPE_HASH: u32 = 1;
const BPF_MAP_TYPE_XSKMAP: u32 = 17;
const BPF_F_NO_PREALLOC: u32 = 1;
const BPF_PROG_TYPE_XDP: u32 = 6;
const BPF_ATTACH_TYPE_XDP: u32 = 37;
const BPF_F_XDP_HAS_FRAGS: u32 = 1 << 5;
const XDP_FLAGS_SKB_MODE: u32 = 1 << 1;
const XDP_FLAGS_DRV_MODE: u32 = 1 << 2;

const LICENSE: &CStr = c"Dual MIT/GPL";
const LOG_BYTES: usize = 64 << 10;

/// `union bpf_attr` of `BPF_MAP_CREATE`.
#[repr(C)]
struct MapCreate {
    map_type: u32,
    key_bytes: u32,
    value_bytes: u32,
    max_entries: u32,
    map_flags: u32,
}

/// `union bpf_attr` of `BPF_MAP_UPDATE_ELEM` and `BPF_MAP_DELETE_ELEM`, which looks at the key alone.
#[repr(C)]
struct MapUpdate {
    map_fd: i32,
    padding: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `union bpf_attr` of `BPF_PROG_LOAD`, as far as `expected_attach_type`.
#[repr(C)]
struct ProgramLoad {
    program_type: u32,
    instruction_count: u32,
    instructions: u64,
    license: u64,
    log_level: u32,
    log_bytes: u32,
    log: u64,
    kernel_version: u32,
    flags: u32,
    name: [u8; 16],
    ifindex: u32,
    expected_attach_type: u32,
}

/// `union bpf_attr` of `BPF_LINK_CREATE`.
#[repr(C)]
struct LinkCreate {
    program_fd: i32,
    target_ifindex: u32,
    attach_type: u32,
    flags: u32,
}

const _: () = assert!(mem::size_of::<MapCreate>() == 20);
const _: () = assert!(mem::size_of::<MapUpdate>() == 32);
const _: () = assert!(mem::size_of::<ProgramLoad>() == 72);
const _: () = assert!(mem::offset_of!(ProgramLoad, expected_attach_type) == 68);
const _: () = assert!(mem::size_of::<LinkCreate>() == 16);

/// Calls bpf(2).
///
/// # Safety
///
/// `attributes` must be the structure of `command`, and the addresses in it valid for what it does.
unsafe fn bpf<T>(command: i32, attributes: &mut T) -> io::Result<i32> {
    let size = mem::size_of::<T>();
    // SAFETY: the caller keeps the contract of the command.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attributes), size) };
    i32::try_from(result).ok().filter(|fd| *fd >= 0).ok_or_else(io::Error::last_os_error)
}

/// Calls bpf(2) for a command that gives a new descriptor.
///
/// # Safety
///
/// As for [`bpf`].
unsafe fn bpf_fd<T>(command: i32, attributes: &mut T) -> io::Result<OwnedFd> {
    // SAFETY: the caller keeps the contract; the descriptor is new and ours.
    unsafe { Ok(OwnedFd::from_raw_fd(bpf(command, attributes)?)) }
}

/// Changes an element of a map.
///
/// # Safety
///
/// `key`, and `value` where the command looks at it, must be addresses of readable memory of the sizes that the map was made
/// with.
unsafe fn change_element(map: &OwnedFd, command: i32, key: u64, value: u64) -> io::Result<()> {
    let mut attributes = MapUpdate { map_fd: map.as_raw_fd(), padding: 0, key, value, flags: 0 };
    // SAFETY: the structure of the command; the caller answers for the addresses.
    unsafe { bpf(command, &mut attributes) }.map(drop)
}

/// What making maps and programs for XDP needs.
const BPF_CAPABILITIES: &[Capability] = &[Capability::Bpf, Capability::NetAdmin];

/// The address of something for a field of the kernel's.
fn address<T: ?Sized>(of: *const T) -> u64 {
    of.cast::<u8>().addr() as u64
}

/// Makes a map of words or, for a hash, of address keys.
fn create_map(map_type: u32, key_bytes: u32, entries: u32, map_flags: u32) -> Result<OwnedFd, Error> {
    let mut attributes =
        MapCreate { map_type, key_bytes, value_bytes: WORD_BYTES, max_entries: entries, map_flags };
    // SAFETY: the structure of the command; no addresses.
    unsafe { bpf_fd(BPF_MAP_CREATE, &mut attributes) }
        .map_err(|source| Error::privileged("creating a BPF map", BPF_CAPABILITIES, source))
}

const WORD_BYTES: u32 = 4;

/// A map from a number to an AF_XDP socket: the receive queue's, or one of several sockets on it.
#[derive(Debug)]
pub struct XskMap {
    fd: OwnedFd,
    entries: u32,
}

impl XskMap {
    /// Makes a map for the numbers 0 to `entries` - 1.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_BPF`, or what the kernel said.
    pub fn new(entries: u32) -> Result<Self, Error> {
        Ok(Self { fd: create_map(BPF_MAP_TYPE_XSKMAP, WORD_BYTES, entries, 0)?, entries })
    }

    /// Puts `socket` at `number`. The entry goes away with the socket.
    ///
    /// # Errors
    ///
    /// What the kernel said.
    pub fn set(&self, number: u32, socket: BorrowedFd<'_>) -> Result<(), Error> {
        debug_assert!(number < self.entries);
        let value = socket.as_raw_fd();
        let (key, value) = (address(&raw const number), address(&raw const value));
        // SAFETY: key and value are four readable bytes each, as the map was made.
        unsafe { change_element(&self.fd, BPF_MAP_UPDATE_ELEM, key, value) }.map_err(|source| {
            Error::privileged("putting an AF_XDP socket into the BPF map", BPF_CAPABILITIES, source)
        })
    }
}

/// Bytes of a key of an [`AddressMap`]: a MAC, then zeros.
pub(crate) const ADDRESS_KEY_BYTES: usize = 8;

/// A key as the program puts it together: four bytes, then two as a word.
pub(crate) fn address_key(mac: [u8; 6]) -> [u8; ADDRESS_KEY_BYTES] {
    let [a, b, c, d, e, f] = mac;
    let [w, x, y, z] = u32::from(u16::from_ne_bytes([e, f])).to_ne_bytes();
    [a, b, c, d, w, x, y, z]
}

/// A map from destination address to lane, which the program adds to the receive queue's place in the map of sockets.
#[derive(Debug)]
pub struct AddressMap {
    fd: OwnedFd,
    queues: u32,
}

impl AddressMap {
    /// Makes a map with room for `entries` addresses, for an interface of `queues` receive queues.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_BPF`, or what the kernel said.
    pub fn new(entries: u32, queues: u32) -> Result<Self, Error> {
        let key_bytes = u32::try_from(ADDRESS_KEY_BYTES).expect("a few bytes");
        // Entries are made as they come: most nodes have few.
        let fd = create_map(BPF_MAP_TYPE_HASH, key_bytes, entries, BPF_F_NO_PREALLOC)?;
        Ok(Self { fd, queues })
    }

    /// The place of a lane of a queue in the map of sockets. Lane 0 is where frames of unknown addresses go.
    pub fn place(&self, lane: u16, queue: u32) -> u32 {
        u32::from(lane) * self.queues + queue
    }

    /// Sends frames for `mac` to that lane from now on.
    ///
    /// # Errors
    ///
    /// `E2BIG` where the map is full; otherwise what the kernel said.
    pub fn set(&self, mac: [u8; 6], lane: u16) -> Result<(), Error> {
        let place = self.place(lane, 0);
        self.change(BPF_MAP_UPDATE_ELEM, mac, Some(&place))
    }

    /// Sends frames for `mac` to lane 0 again.
    ///
    /// # Errors
    ///
    /// `ENOENT` where it has no other lane; otherwise what the kernel said.
    pub fn remove(&self, mac: [u8; 6]) -> Result<(), Error> {
        self.change(BPF_MAP_DELETE_ELEM, mac, None)
    }

    fn change(&self, command: i32, mac: [u8; 6], value: Option<&u32>) -> Result<(), Error> {
        let key = address_key(mac);
        // The kernel refuses what a command does not look at, unless it is zero.
        let value = value.map_or(0, |place| address(std::ptr::from_ref(place)));
        // SAFETY: key and value are readable, of the sizes that the map was made with.
        unsafe { change_element(&self.fd, command, address(&raw const key), value) }.map_err(|source| {
            Error::privileged("steering an address by the BPF map", BPF_CAPABILITIES, source)
        })
    }
}

/// An XDP program in the kernel.
#[derive(Debug)]
pub struct LoadedProgram {
    fd: OwnedFd,
}

impl LoadedProgram {
    /// Loads the program that sends the frames which `filter` wants to the sockets in `map`.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_BPF`, or [`Error::Verifier`] with the verifier's log.
    pub fn load(filter: &FrameFilter, map: &XskMap) -> Result<Self, Error> {
        Self::load_program(&Program::redirect_by_queue(filter, map.fd.as_raw_fd()))
    }

    /// Loads the program that sends the frames which `filter` wants to the socket in `map` at the place of their address's
    /// lane on their queue.
    ///
    /// # Errors
    ///
    /// As for [`LoadedProgram::load`].
    pub fn load_steering(filter: &FrameFilter, map: &XskMap, addresses: &AddressMap) -> Result<Self, Error> {
        let (sockets, lanes) = (map.fd.as_raw_fd(), addresses.fd.as_raw_fd());
        Self::load_program(&Program::redirect_by_address(filter, sockets, lanes, addresses.queues))
    }

    fn load_program(program: &Program) -> Result<Self, Error> {
        match load(program, &mut []) {
            Ok(fd) => Ok(Self { fd }),
            Err(source) if matches!(source.raw_os_error(), Some(libc::EPERM)) => {
                Err(Error::privileged("loading an XDP program", BPF_CAPABILITIES, source))
            }
            Err(source) => {
                let mut log = vec![0; LOG_BYTES];
                // Once more for the verifier's words; the error that counts is the first.
                let _refused_again = load(program, &mut log);
                let end = log.iter().position(|byte| *byte == 0).unwrap_or(log.len());
                let text = String::from_utf8_lossy(&log[..end]).trim().to_owned();
                Err(Error::Verifier { source, log: text })
            }
        }
    }

    /// Runs the program on a frame, in the kernel, without an interface; gives the XDP action.
    #[cfg(test)]
    pub(crate) fn test_run(&self, frame: &[u8]) -> io::Result<u32> {
        /// `union bpf_attr` of `BPF_PROG_TEST_RUN`.
        #[repr(C)]
        struct TestRun {
            program_fd: i32,
            result: u32,
            data_in_bytes: u32,
            data_out_bytes: u32,
            data_in: u64,
            data_out: u64,
            repeat: u32,
            duration: u32,
            context: [u64; 3],
            flags: u32,
            cpu: u32,
            batch: u32,
            padding: u32,
        }
        let mut attributes = TestRun {
            program_fd: self.fd.as_raw_fd(),
            result: 0,
            data_in_bytes: u32::try_from(frame.len()).unwrap(),
            data_out_bytes: 0,
            data_in: address(frame),
            data_out: 0,
            repeat: 1,
            duration: 0,
            context: [0; 3],
            flags: 0,
            cpu: 0,
            batch: 0,
            padding: 0,
        };
        // SAFETY: the structure of the command; the frame is readable for its length.
        unsafe { bpf(BPF_PROG_TEST_RUN, &mut attributes) }?;
        Ok(attributes.result)
    }
}

fn load(program: &Program, log: &mut [u8]) -> io::Result<OwnedFd> {
    let instructions = program.instructions();
    let mut name = [0; 16];
    name[..7].copy_from_slice(b"aoe_xdp");
    let mut attributes = ProgramLoad {
        program_type: BPF_PROG_TYPE_XDP,
        instruction_count: u32::try_from(instructions.len()).expect("the program is short"),
        instructions: address(instructions),
        license: address(LICENSE.as_ptr()),
        log_level: u32::from(!log.is_empty()),
        log_bytes: u32::try_from(log.len()).expect("the log is small"),
        log: if log.is_empty() { 0 } else { address(log) },
        kernel_version: 0,
        flags: BPF_F_XDP_HAS_FRAGS,
        name,
        ifindex: 0,
        expected_attach_type: BPF_ATTACH_TYPE_XDP,
    };
    // SAFETY: the structure of the command; instructions and license are readable, the log writable.
    unsafe { bpf_fd(BPF_PROG_LOAD, &mut attributes) }
}

/// Where a program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AttachMode {
    /// In the driver, before a socket buffer is made.
    Native,
    /// In the kernel's generic hook, which every interface has.
    Generic,
}

/// An attached program; it is detached when the value is dropped or the process ends.
#[derive(Debug)]
pub struct XdpLink {
    _fd: OwnedFd,
    mode: AttachMode,
}

impl XdpLink {
    /// Attaches a program to the interface `ifindex`.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_NET_ADMIN`; `EBUSY` or `EEXIST` where another program is attached;
    /// `EOPNOTSUPP` where the driver has no native XDP.
    pub fn attach(program: &LoadedProgram, ifindex: u32, mode: AttachMode) -> Result<Self, Error> {
        let mut attributes = LinkCreate {
            program_fd: program.fd.as_raw_fd(),
            target_ifindex: ifindex,
            attach_type: BPF_ATTACH_TYPE_XDP,
            flags: match mode {
                AttachMode::Native => XDP_FLAGS_DRV_MODE,
                AttachMode::Generic => XDP_FLAGS_SKB_MODE,
            },
        };
        // SAFETY: the structure of the command; no addresses.
        let fd = unsafe { bpf_fd(BPF_LINK_CREATE, &mut attributes) }.map_err(|source| {
            let action = match mode {
                AttachMode::Native => "attaching the XDP program in the driver",
                AttachMode::Generic => "attaching the XDP program in the generic hook",
            };
            Error::privileged(action, &[Capability::NetAdmin], source)
        })?;
        Ok(Self { _fd: fd, mode })
    }

    /// Where the program runs.
    pub fn mode(&self) -> AttachMode {
        self.mode
    }
}
