//! A plain socket of one interface, with the buffers that the system gives every program: for who stands where an
//! initiator stands and needs no speed, such as tests.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::time::Duration;

use crate::error::Error;
use crate::packet::{bind, open_raw};

/// Sends and receives whole frames of one EtherType, without their VLAN tags.
#[derive(Debug)]
pub struct RawSocket {
    file: File,
}

impl RawSocket {
    /// Opens a socket for frames of `ethertype` on the interface `index`.
    ///
    /// # Errors
    ///
    /// [`Error::Privilege`] naming `CAP_NET_RAW`, or the failed call.
    pub fn open(index: u32, ethertype: u16) -> Result<Self, Error> {
        let fd = open_raw("opening an AF_PACKET socket")?;
        bind(fd.as_fd(), index, ethertype)?;
        Ok(Self { file: File::from(fd) })
    }

    /// Sends one frame, from the destination address on.
    ///
    /// # Errors
    ///
    /// What send says: `ENETDOWN`, `EMSGSIZE`, a full buffer.
    pub fn send(&mut self, frame: &[u8]) -> io::Result<()> {
        self.file.write(frame).map(drop)
    }

    /// Receives one frame into `buffer` and gives its length, or `None` when none came within `timeout`.
    ///
    /// # Errors
    ///
    /// What poll and recv say: `ENETDOWN` after the interface went down.
    pub fn receive(&mut self, buffer: &mut [u8], timeout: Duration) -> io::Result<Option<usize>> {
        let mut wanted = libc::pollfd { fd: self.file.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        let timeout_ms = i32::try_from(timeout.as_millis()).unwrap_or(i32::MAX);
        // SAFETY: one structure, writable, for the length of the call.
        let ready = unsafe { libc::poll(&raw mut wanted, 1, timeout_ms) };
        if ready < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(None) } else { Err(error) };
        }
        match self.file.read(buffer) {
            Ok(length) => Ok(Some(length)),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
        }
    }
}
