//! Kernel interfaces that `libc` does not have, with their sizes asserted, and thin calls over sockets.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use crate::error::{Capability, Error};

/// `XDP_MAX_TX_SKB_BUDGET` of include/uapi/linux/if_xdp.h (Linux 6.17): descriptors one kick may send in
/// copy mode.
pub(crate) const XDP_MAX_TX_SKB_BUDGET: i32 = 9;

/// `ETHTOOL_GDRVINFO` of include/uapi/linux/ethtool.h.
pub(crate) const ETHTOOL_GDRVINFO: u32 = 0x03;
/// `ETHTOOL_GCHANNELS` of include/uapi/linux/ethtool.h.
pub(crate) const ETHTOOL_GCHANNELS: u32 = 0x3c;
/// One eBPF instruction (`struct bpf_insn`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct BpfInsn {
    pub(crate) code: u8,
    /// Destination register in the low four bits, source register in the high four (little endian).
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

const _: () = assert!(mem::size_of::<BpfInsn>() == 8);
const _: () = assert!(mem::size_of::<libc::xdp_desc>() == 16);
const _: () = assert!(mem::size_of::<libc::xdp_umem_reg>() == 32);
const _: () = assert!(mem::size_of::<libc::xdp_options>() == 4);
const _: () = assert!(mem::size_of::<libc::xdp_statistics>() == 48);
const _: () = assert!(mem::size_of::<libc::xdp_mmap_offsets>() == 128);
const _: () = assert!(mem::size_of::<libc::sockaddr_xdp>() == 16);
const _: () = assert!(mem::size_of::<libc::ifreq>() == 40);

/// Opens a close-on-exec socket; EPERM names `capability`.
pub(crate) fn open_socket(
    domain: i32,
    kind: i32,
    protocol: i32,
    action: &'static str,
    capability: Capability,
) -> Result<OwnedFd, Error> {
    // SAFETY: a plain system call without pointers.
    let fd = unsafe { libc::socket(domain, kind | libc::SOCK_CLOEXEC, protocol) };
    if fd < 0 {
        return Err(Error::privileged(action, &[capability], io::Error::last_os_error()));
    }
    // SAFETY: a descriptor that the kernel just gave to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Sets a socket option from plain data without padding.
pub(crate) fn set_option<T: Copy>(fd: BorrowedFd<'_>, level: i32, name: i32, value: &T) -> io::Result<()> {
    let length = length_of::<T>();
    // SAFETY: the pointer is to `length` readable bytes.
    let result =
        unsafe { libc::setsockopt(fd.as_raw_fd(), level, name, std::ptr::from_ref(value).cast(), length) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Reads a socket option into plain data for which every bit pattern, all zero included, is valid.
///
/// # Safety
///
/// `T` must be such plain data. The kernel may write less than all of it.
pub(crate) unsafe fn get_option<T: Copy>(fd: BorrowedFd<'_>, level: i32, name: i32) -> io::Result<T> {
    // SAFETY: the caller says that zero is a valid `T`.
    let mut value: T = unsafe { mem::zeroed() };
    let mut length = length_of::<T>();
    // SAFETY: the pointer is to `length` writable bytes.
    let result = unsafe {
        libc::getsockopt(fd.as_raw_fd(), level, name, std::ptr::from_mut(&mut value).cast(), &mut length)
    };
    if result == 0 { Ok(value) } else { Err(io::Error::last_os_error()) }
}

/// The size of a kernel structure as a `socklen_t`.
pub(crate) fn length_of<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(mem::size_of::<T>()).expect("kernel structures are small")
}
