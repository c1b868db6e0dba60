//! The netdev generic-netlink family (Linux 6.3): what XDP can do on an interface, as its driver says.
//!
//! Only for explanations and limits: what a bind really gave is read back from the socket. Parsing is
//! total; whatever is odd is an absence.

use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::Capability;
use crate::sys;

/// `NETDEV_CMD_DEV_GET` of include/uapi/linux/netdev.h.
const NETDEV_CMD_DEV_GET: u8 = 1;
const NETDEV_A_DEV_IFINDEX: u16 = 1;
const NETDEV_A_DEV_XDP_FEATURES: u16 = 3;
const NETDEV_A_DEV_XDP_ZC_MAX_SEGS: u16 = 4;
const NETDEV_XDP_ACT_REDIRECT: u64 = 1 << 1;
const NETDEV_XDP_ACT_XSK_ZEROCOPY: u64 = 1 << 3;
const NETDEV_XDP_ACT_RX_SG: u64 = 1 << 5;

const CTRL_CMD_GETFAMILY: u8 = 3;
const CTRL_ATTR_FAMILY_ID: u16 = 1;
const CTRL_ATTR_FAMILY_NAME: u16 = 2;

const NLMSG_HEADER_BYTES: usize = 16;
const GENL_HEADER_BYTES: usize = 4;

/// What an interface's driver declares.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// XDP programs may redirect natively.
    pub native_redirect: bool,
    /// AF_XDP zero-copy.
    pub zero_copy: bool,
    /// XDP programs see frames of several buffers.
    pub receive_segments: bool,
    /// Descriptors one zero-copy frame may have; 1 is no multi-buffer, 0 is not said.
    pub zero_copy_segments: u32,
}

/// Asks for the features of the interface `index`; `None` where the kernel does not say.
pub(crate) fn features(index: u32) -> Option<Features> {
    let fd = sys::open_socket(
        libc::AF_NETLINK,
        libc::SOCK_RAW,
        libc::NETLINK_GENERIC,
        "opening a netlink socket",
        Capability::NetAdmin,
    )
    .ok()?;
    let control = u16::try_from(libc::GENL_ID_CTRL).ok()?;
    let reply = ask(&fd, &request(control, CTRL_CMD_GETFAMILY, CTRL_ATTR_FAMILY_NAME, b"netdev\0"))?;
    let family = parse_family(&reply)?;
    let reply = ask(&fd, &request(family, NETDEV_CMD_DEV_GET, NETDEV_A_DEV_IFINDEX, &index.to_ne_bytes()))?;
    parse_features(&reply)
}

/// One request with one attribute.
fn request(family: u16, command: u8, attribute: u16, value: &[u8]) -> Vec<u8> {
    let attribute_bytes = 4 + value.len();
    let total = NLMSG_HEADER_BYTES + GENL_HEADER_BYTES + attribute_bytes.next_multiple_of(4);
    let length = u32::try_from(total).expect("requests are small");
    let flags = u16::try_from(libc::NLM_F_REQUEST).expect("netlink flags are 16 bits");
    let mut message = Vec::with_capacity(total);
    message.extend_from_slice(&length.to_ne_bytes());
    message.extend_from_slice(&family.to_ne_bytes());
    message.extend_from_slice(&flags.to_ne_bytes());
    message.extend_from_slice(&[0; 8]); // sequence and port: one request at a time on a socket of its own
    message.extend_from_slice(&[command, 1, 0, 0]);
    message.extend_from_slice(&u16::try_from(attribute_bytes).expect("attributes are small").to_ne_bytes());
    message.extend_from_slice(&attribute.to_ne_bytes());
    message.extend_from_slice(value);
    message.resize(total, 0);
    message
}

fn ask(fd: &OwnedFd, message: &[u8]) -> Option<Vec<u8>> {
    // SAFETY: a readable buffer of the length given; no address: netlink sends to the kernel.
    let sent = unsafe { libc::send(fd.as_raw_fd(), message.as_ptr().cast(), message.len(), 0) };
    if usize::try_from(sent).ok()? != message.len() {
        return None;
    }
    let mut reply = vec![0; 8192];
    // SAFETY: a writable buffer of the length given.
    let got = unsafe { libc::recv(fd.as_raw_fd(), reply.as_mut_ptr().cast(), reply.len(), 0) };
    reply.truncate(usize::try_from(got).ok()?);
    Some(reply)
}

fn parse_family(reply: &[u8]) -> Option<u16> {
    let value = attributes(reply)?.find(|(kind, _)| *kind == CTRL_ATTR_FAMILY_ID)?.1;
    Some(u16::from_ne_bytes(value.try_into().ok()?))
}

fn parse_features(reply: &[u8]) -> Option<Features> {
    let mut bits = None;
    let mut segments = 0;
    for (kind, value) in attributes(reply)? {
        match kind {
            NETDEV_A_DEV_XDP_FEATURES => bits = Some(u64::from_ne_bytes(value.try_into().ok()?)),
            NETDEV_A_DEV_XDP_ZC_MAX_SEGS => segments = u32::from_ne_bytes(value.try_into().ok()?),
            _ => {}
        }
    }
    let bits = bits?;
    Some(Features {
        native_redirect: bits & NETDEV_XDP_ACT_REDIRECT != 0,
        zero_copy: bits & NETDEV_XDP_ACT_XSK_ZEROCOPY != 0,
        receive_segments: bits & NETDEV_XDP_ACT_RX_SG != 0,
        zero_copy_segments: segments,
    })
}

/// The attributes of the first message of a reply; `None` where it is an error or too short.
fn attributes(reply: &[u8]) -> Option<impl Iterator<Item = (u16, &[u8])>> {
    let length = u32::from_ne_bytes(reply.get(..4)?.try_into().ok()?) as usize;
    let kind = u16::from_ne_bytes(reply.get(4..6)?.try_into().ok()?);
    if i32::from(kind) == libc::NLMSG_ERROR {
        return None;
    }
    let mut rest = reply.get(NLMSG_HEADER_BYTES + GENL_HEADER_BYTES..length)?;
    Some(std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(rest.get(..2)?.try_into().ok()?));
        let kind = u16::from_ne_bytes(rest.get(2..4)?.try_into().ok()?);
        let value = rest.get(4..length)?;
        rest = rest.get(length.next_multiple_of(4)..).unwrap_or(&[]);
        // The two highest bits are flags (nested, network byte order).
        Some((kind & 0x3fff, value))
    }))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reply_with(attributes: &[(u16, &[u8])]) -> Vec<u8> {
        let mut message = vec![0; NLMSG_HEADER_BYTES + GENL_HEADER_BYTES];
        message[4] = 0x20;
        for (kind, value) in attributes {
            let length = u16::try_from(4 + value.len()).unwrap();
            message.extend_from_slice(&length.to_ne_bytes());
            message.extend_from_slice(&kind.to_ne_bytes());
            message.extend_from_slice(value);
            message.resize(message.len().next_multiple_of(4), 0);
        }
        let length = u32::try_from(message.len()).unwrap();
        message[..4].copy_from_slice(&length.to_ne_bytes());
        message
    }

    #[test]
    fn features_are_read_bit_by_bit() {
        let reply = reply_with(&[
            (NETDEV_A_DEV_IFINDEX, &7u32.to_ne_bytes()),
            (NETDEV_A_DEV_XDP_FEATURES, &(1u64 << 1 | 1 << 3).to_ne_bytes()),
            (NETDEV_A_DEV_XDP_ZC_MAX_SEGS, &8u32.to_ne_bytes()),
        ]);
        let expected = Features {
            native_redirect: true,
            zero_copy: true,
            receive_segments: false,
            zero_copy_segments: 8,
        };
        assert_eq!(parse_features(&reply), Some(expected));
    }

    #[test]
    fn a_reply_without_features_is_an_absence() {
        assert_eq!(parse_features(&reply_with(&[(NETDEV_A_DEV_IFINDEX, &7u32.to_ne_bytes())])), None);
        assert_eq!(parse_features(&reply_with(&[(NETDEV_A_DEV_XDP_FEATURES, &[1, 2])])), None);
        let mut error = reply_with(&[(NETDEV_A_DEV_XDP_FEATURES, &[0; 8])]);
        error[4..6].copy_from_slice(&2u16.to_ne_bytes());
        assert_eq!(parse_features(&error), None);
    }

    proptest! {
        #[test]
        fn replies_of_any_bytes_are_parsed(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            parse_family(&bytes);
            parse_features(&bytes);
        }

        #[test]
        fn replies_of_any_attributes_are_parsed(
            kinds in proptest::collection::vec((0u16..9, proptest::collection::vec(any::<u8>(), 0..12)), 0..9),
            cut in 0usize..64,
        ) {
            let borrowed: Vec<(u16, &[u8])> = kinds.iter().map(|(k, v)| (*k, v.as_slice())).collect();
            let mut reply = reply_with(&borrowed);
            parse_features(&reply);
            reply.truncate(reply.len().saturating_sub(cut));
            parse_features(&reply);
            parse_family(&reply);
        }
    }
}
