//! What the kernel says of a network interface, asked by ioctl and netlink.
//!
//! Not by sysfs: a mounted `/sys` shows the network namespace it was mounted in, which need not be ours.
//! Replies are parsed totally: a short or odd one is an error or an absence, never a panic.

use std::mem;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use crate::error::{Capability, Error};
use crate::netdev;
use crate::sys;

pub use crate::netdev::Features;

/// An interface of the network namespace the value was made in, found by name.
#[derive(Debug)]
pub struct Nic {
    name: [u8; libc::IFNAMSIZ],
    index: u32,
    socket: OwnedFd,
}

/// What changes while an interface is in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct NicState {
    /// The index of the interface that has the name now: another one than [`Nic::index`] once the interface was
    /// deleted and made again, or its driver loaded again.
    pub index: u32,
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Up with carrier (`IFF_RUNNING`).
    pub running: bool,
    /// Maximum transmission unit: bytes after the 14-byte Ethernet header.
    pub mtu_bytes: u32,
    /// The interface's own hardware address.
    pub mac: [u8; 6],
}

/// Queue counts of an interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Queues {
    /// Queues that receive.
    pub receive: u16,
    /// Queues that transmit.
    pub transmit: u16,
}

impl Nic {
    /// Finds an interface by name.
    ///
    /// # Errors
    ///
    /// [`Error::UnknownInterface`], or the failed call.
    pub fn open(name: &str) -> Result<Self, Error> {
        let unknown = || Error::UnknownInterface { name: name.to_owned() };
        let bytes = name.as_bytes();
        if bytes.is_empty() || bytes.len() >= libc::IFNAMSIZ || bytes.contains(&0) {
            return Err(unknown());
        }
        let mut padded = [0; libc::IFNAMSIZ];
        padded[..bytes.len()].copy_from_slice(bytes);
        let socket = sys::open_socket(
            libc::AF_INET,
            libc::SOCK_DGRAM,
            0,
            "opening a socket to ask for interfaces",
            Capability::NetRaw,
        )?;
        let mut nic = Self { name: padded, index: 0, socket };
        nic.index = match nic.index_now() {
            Err(error) if error.errno() == Some(libc::ENODEV) => return Err(unknown()),
            result => result?,
        };
        Ok(nic)
    }

    /// The index of the interface that has the name now.
    fn index_now(&self) -> Result<u32, Error> {
        let reply = self.request(libc::SIOCGIFINDEX, "looking the interface up")?;
        // SAFETY: the kernel filled the index in.
        let index = unsafe { reply.ifr_ifru.ifru_ifindex };
        u32::try_from(index).map_err(|_| Error::Malformed { what: "interface index" })
    }

    /// The kernel's index of the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// Flags, MTU and address as they are now.
    ///
    /// # Errors
    ///
    /// [`Error::Os`] where the interface is gone.
    pub fn state(&self) -> Result<NicState, Error> {
        let reply = self.request(libc::SIOCGIFFLAGS, "reading the interface's flags")?;
        // SAFETY: the kernel filled the flags in.
        let flags = i32::from(unsafe { reply.ifr_ifru.ifru_flags });
        let reply = self.request(libc::SIOCGIFMTU, "reading the interface's MTU")?;
        // SAFETY: the kernel filled the MTU in.
        let mtu = unsafe { reply.ifr_ifru.ifru_mtu };
        let reply = self.request(libc::SIOCGIFHWADDR, "reading the interface's address")?;
        // SAFETY: the kernel filled the address in; its bytes are plain.
        let address = unsafe { reply.ifr_ifru.ifru_hwaddr.sa_data };
        let mut mac = [0; 6];
        for (byte, from) in mac.iter_mut().zip(address) {
            *byte = from.to_ne_bytes()[0];
        }
        Ok(NicState {
            index: self.index_now()?,
            up: flags & libc::IFF_UP != 0,
            running: flags & libc::IFF_UP != 0 && flags & libc::IFF_RUNNING != 0,
            mtu_bytes: u32::try_from(mtu).map_err(|_| Error::Malformed { what: "interface MTU" })?,
            mac,
        })
    }

    /// How many queues the interface has in use; one of each where its driver does not say.
    pub fn queues(&self) -> Queues {
        let mut reply = [0; 36];
        match self.ethtool(sys::ETHTOOL_GCHANNELS, &mut reply) {
            Ok(()) => parse_channels(&reply),
            Err(_) => Queues { receive: 1, transmit: 1 },
        }
    }

    /// The driver's name; empty where it does not say.
    pub fn driver(&self) -> String {
        let mut reply = [0; 196];
        match self.ethtool(sys::ETHTOOL_GDRVINFO, &mut reply) {
            Ok(()) => parse_driver(&reply),
            Err(_) => String::new(),
        }
    }

    /// What XDP can do here, as the driver declares it (netdev generic netlink, Linux 6.3); `None` where
    /// the kernel does not say.
    pub fn features(&self) -> Option<Features> {
        netdev::features(self.index)
    }

    /// One `SIOCGIF…` request by name.
    fn request(&self, code: libc::c_ulong, action: &'static str) -> Result<libc::ifreq, Error> {
        let mut request = self.empty_request();
        self.ioctl(code, &mut request, action)?;
        Ok(request)
    }

    /// One ethtool request: `reply` starts with the command and is filled in by the kernel.
    pub(crate) fn ethtool(&self, command: u32, reply: &mut [u8]) -> Result<(), Error> {
        reply[..4].copy_from_slice(&command.to_ne_bytes());
        let mut request = self.empty_request();
        request.ifr_ifru.ifru_data = reply.as_mut_ptr().cast();
        self.ioctl(libc::SIOCETHTOOL, &mut request, "asking the interface's driver")
    }

    fn ioctl(
        &self,
        code: libc::c_ulong,
        request: &mut libc::ifreq,
        action: &'static str,
    ) -> Result<(), Error> {
        // SAFETY: `request` is a whole ifreq; where it points to a buffer, the buffer is as long as the
        // structure of the ethtool command in it.
        let result = unsafe { libc::ioctl(self.socket.as_fd().as_raw_fd(), code as _, request) };
        if result < 0 { Err(Error::last(action)) } else { Ok(()) }
    }

    fn empty_request(&self) -> libc::ifreq {
        // SAFETY: all zero is a valid ifreq.
        let mut request: libc::ifreq = unsafe { mem::zeroed() };
        for (to, from) in request.ifr_name.iter_mut().zip(self.name) {
            *to = libc::c_char::from_ne_bytes([from]);
        }
        request
    }
}

/// `struct ethtool_channels`: command, four maxima, then receive, transmit, other and combined counts.
fn parse_channels(reply: &[u8]) -> Queues {
    let word = |index: usize| word_at(reply, index * 4).unwrap_or(0);
    let (receive, transmit, combined) = (word(5), word(6), word(8));
    let count = |own: u32| u16::try_from(own.saturating_add(combined)).unwrap_or(u16::MAX).max(1);
    Queues { receive: count(receive), transmit: count(transmit) }
}

/// `struct ethtool_drvinfo`: command, then the driver's name in 32 bytes, not always terminated.
fn parse_driver(reply: &[u8]) -> String {
    let name = reply.get(4..36).unwrap_or(&[]);
    let end = name.iter().position(|byte| *byte == 0).unwrap_or(name.len());
    String::from_utf8_lossy(&name[..end]).into_owned()
}

pub(crate) fn word_at(bytes: &[u8], at: usize) -> Option<u32> {
    let word = bytes.get(at..at.checked_add(4)?)?;
    Some(u32::from_ne_bytes(word.try_into().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn channels_count_combined_queues_in_both_directions() {
        let mut reply = [0u8; 36];
        for (index, count) in [(5usize, 1u32), (6, 2), (8, 4)] {
            reply[index * 4..][..4].copy_from_slice(&count.to_ne_bytes());
        }
        assert_eq!(parse_channels(&reply), Queues { receive: 5, transmit: 6 });
        assert_eq!(parse_channels(&[]), Queues { receive: 1, transmit: 1 });
    }

    #[test]
    fn a_driver_name_without_terminator_is_read_whole() {
        let mut reply = [b'x'; 196];
        reply[36] = b'y';
        assert_eq!(parse_driver(&reply), "x".repeat(32));
        reply[8] = 0;
        assert_eq!(parse_driver(&reply), "xxxx");
    }

    #[test]
    fn impossible_names_are_unknown_interfaces() {
        for name in ["", "a-name-that-is-too-long-for-linux", "nul\0inside", "no-such-if0"] {
            assert!(matches!(Nic::open(name), Err(Error::UnknownInterface { .. })), "{name:?}");
        }
    }

    #[test]
    fn loopback_is_described() {
        let nic = Nic::open("lo").expect("every namespace has a loopback interface");
        let state = nic.state().expect("the loopback's state is readable");
        assert_eq!((state.index, state.mac), (nic.index(), [0; 6]));
        assert!(state.mtu_bytes >= 1500);
        assert_eq!(nic.queues(), Queues { receive: 1, transmit: 1 });
    }

    proptest! {
        #[test]
        fn replies_of_any_bytes_are_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..256)) {
            let queues = parse_channels(&bytes);
            prop_assert!(queues.receive >= 1 && queues.transmit >= 1);
            prop_assert!(parse_driver(&bytes).chars().count() <= 32);
        }
    }
}
