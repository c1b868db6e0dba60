//! What is looked at before a node starts anything, so that what cannot work is said at once and with the next step.
//!
//! Nothing here changes the machine.

use std::collections::BTreeMap;
use std::fs;
use std::io;
use std::io::Read;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs, UdpSocket};
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use cluster_map::{ClusterKey, LinkChoice, PeerAddr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};
use rustix::thread::CapabilitySet;
use thiserror::Error;

use crate::model::{StoreSpec, parse_key};
use crate::ops::{self, MIN_STORE_BYTES};
use crate::settings::{LogicalInterface, parse_interfaces};
use crate::size::{self, human};

/// Smallest MTU: an AoE frame of two sectors (36 bytes of headers, of which 14 do not count, and 1024 of data), with room.
pub const MIN_MTU: u32 = 1060;

/// Port of core 0 for peers where none is named.
pub const PEER_PORT: u16 = 4330;

/// Why a node cannot start.
#[derive(Debug, Error)]
pub enum CheckError {
    /// Something is not as it must be; the text names the next step.
    #[error("{0}")]
    Refused(String),
    /// The machine could not be asked.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// What the kernel said.
        source: io::Error,
    },
}

fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> CheckError {
    let what = what.into();
    move |source| CheckError::Io { what, source }
}

/// A network interface as the kernel shows it in this network namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Interface {
    /// Administratively up (`IFF_UP`).
    pub up: bool,
    /// Has a carrier (`IFF_LOWER_UP`).
    pub carrier: bool,
    /// MTU in bytes.
    pub mtu: u32,
}

/// All interfaces of this network namespace, by name. Asks rtnetlink: `/sys` may show another namespace.
///
/// # Errors
/// What the kernel answers.
pub fn interfaces() -> io::Result<BTreeMap<String, Interface>> {
    const RTM_GETLINK: u16 = 18;
    const NLM_F_REQUEST_DUMP: u16 = 0x301;
    const HEADER_BYTES: u32 = 32;
    // No protocol is protocol 0: NETLINK_ROUTE.
    let socket =
        rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    let mut request = Vec::with_capacity(32);
    request.extend(HEADER_BYTES.to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST_DUMP.to_ne_bytes());
    // Sequence, port, and an ifinfomsg that names no interface.
    request.resize(32, 0);
    rustix::net::sendto(&socket, &request, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut found = BTreeMap::new();
    let mut buffer = vec![0u8; 256 << 10];
    loop {
        let (len, _) = rustix::net::recv(&socket, buffer.as_mut_slice(), RecvFlags::empty())?;
        if parse_links(&buffer[..len], &mut found)? {
            return Ok(found);
        }
    }
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(bytes.get(at..at + 2)?.try_into().ok()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
}

/// Reads netlink messages (`linux/netlink.h`, `linux/rtnetlink.h`); true at the end of the dump.
fn parse_links(mut bytes: &[u8], found: &mut BTreeMap<String, Interface>) -> io::Result<bool> {
    const NLMSG_ERROR: u16 = 2;
    const NLMSG_DONE: u16 = 3;
    const RTM_NEWLINK: u16 = 16;
    let malformed = || io::Error::new(io::ErrorKind::InvalidData, "malformed netlink answer");
    while !bytes.is_empty() {
        let len = u32_at(bytes, 0).and_then(|len| usize::try_from(len).ok()).ok_or_else(malformed)?;
        let message = bytes.get(16..len).ok_or_else(malformed)?;
        match u16_at(bytes, 4).ok_or_else(malformed)? {
            NLMSG_DONE => return Ok(true),
            NLMSG_ERROR => {
                let code = u32_at(message, 0).ok_or_else(malformed)?;
                return Err(io::Error::from_raw_os_error(code.cast_signed().saturating_neg()));
            }
            RTM_NEWLINK => {
                let (name, link) = parse_link(message).ok_or_else(malformed)?;
                found.insert(name, link);
            }
            _ => {}
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Ok(false)
}

fn parse_link(message: &[u8]) -> Option<(String, Interface)> {
    const IFLA_IFNAME: u16 = 3;
    const IFLA_MTU: u16 = 4;
    const IFF_UP: u32 = 1;
    const IFF_LOWER_UP: u32 = 1 << 16;
    let flags = u32_at(message, 8)?;
    let mut link = Interface { up: flags & IFF_UP != 0, carrier: flags & IFF_LOWER_UP != 0, mtu: 0 };
    let mut name = None;
    let mut attributes = message.get(16..)?;
    while attributes.len() >= 4 {
        let len = usize::from(u16_at(attributes, 0)?);
        let value = attributes.get(4..len)?;
        match u16_at(attributes, 2)? {
            IFLA_IFNAME => {
                let text = value.split(|b| *b == 0).next()?;
                name = Some(String::from_utf8_lossy(text).into_owned());
            }
            IFLA_MTU => link.mtu = u32_at(value, 0)?,
            _ => {}
        }
        attributes = attributes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
    }
    Some((name?, link))
}

/// Reads the logical interfaces to serve on, and checks that the network device of each exists, is up and carries an AoE
/// frame.
///
/// # Errors
/// The first that does not, with the next step.
pub fn check_interfaces(
    wanted: &[String],
    present: &BTreeMap<String, Interface>,
) -> Result<Vec<LogicalInterface>, CheckError> {
    let refuse = |text: String| Err(CheckError::Refused(text));
    if wanted.is_empty() {
        return refuse("no interface is named; give one with --interface".into());
    }
    let wanted = parse_interfaces(wanted).map_err(|error| CheckError::Refused(error.to_string()))?;
    for LogicalInterface { netdev, .. } in &wanted {
        let Some(interface) = present.get(netdev) else {
            let names: Vec<_> = present.keys().filter(|name| *name != "lo").map(String::as_str).collect();
            let names = if names.is_empty() { "none".to_owned() } else { names.join(", ") };
            return refuse(format!("there is no interface {netdev} here; these exist: {names}"));
        };
        if !interface.up {
            return refuse(format!("interface {netdev} is down; run `ip link set dev {netdev} up`"));
        }
        if interface.mtu < MIN_MTU {
            let mtu = interface.mtu;
            return refuse(format!(
                "interface {netdev} has MTU {mtu}, at least {MIN_MTU} is needed; run `ip link set dev {netdev} mtu 1500` (better 9000)"
            ));
        }
    }
    Ok(wanted)
}

/// Checks the capabilities that the data plane needs for the link.
///
/// # Errors
/// The missing ones by name.
pub fn check_capabilities(link: LinkChoice) -> Result<(), CheckError> {
    let have = rustix::thread::capabilities(None)
        .map_err(|e| io_error("cannot read this process's capabilities")(e.into()))?
        .effective;
    match missing_capabilities(link, have) {
        missing if missing.is_empty() => Ok(()),
        missing => Err(CheckError::Refused(format!(
            "missing {}; run torusd as root, or give it the capability",
            missing.join(", ")
        ))),
    }
}

fn missing_capabilities(link: LinkChoice, have: CapabilitySet) -> Vec<&'static str> {
    let mut missing = Vec::new();
    let mut need = |any_of: CapabilitySet, name| {
        if !have.intersects(any_of) {
            missing.push(name);
        }
    };
    need(CapabilitySet::NET_RAW, "CAP_NET_RAW (raw Ethernet)");
    if link == LinkChoice::AfXdp {
        need(CapabilitySet::NET_ADMIN, "CAP_NET_ADMIN (attach the XDP program)");
        need(CapabilitySet::BPF | CapabilitySet::SYS_ADMIN, "CAP_BPF (load the XDP program)");
    }
    missing
}

/// Reads one `PATH[:SIZE]`. A colon belongs to the path if what follows it is no size, or if the whole names something.
///
/// # Errors
/// The size does not parse although it starts with a digit and the path does not exist, or is too small.
pub fn parse_store(text: &str) -> Result<StoreSpec, CheckError> {
    let whole = |path: &str| std::path::absolute(path).map_err(io_error(format!("bad path {path}")));
    let (path, size) = match text.rsplit_once(':') {
        Some((path, size)) if !Path::new(text).exists() => match size::parse(size) {
            Ok(0) => return Err(CheckError::Refused(format!("store {path}: a size of 0 is not possible"))),
            Ok(bytes) => (path, bytes),
            Err(error) if size.starts_with(|c: char| c.is_ascii_digit()) => {
                return Err(CheckError::Refused(format!("store {path}: {error}")));
            }
            Err(_) => (text, 0),
        },
        _ => (text, 0),
    };
    if path.is_empty() {
        return Err(CheckError::Refused("a store needs a path: --store PATH or PATH:SIZE".into()));
    }
    let path = whole(path)?;
    let Some(path) = path.to_str() else {
        return Err(CheckError::Refused(format!("store path {} is not UTF-8", path.display())));
    };
    let spec = StoreSpec { path: path.to_owned(), size };
    ops::check_store(&spec).map_err(|refusal| CheckError::Refused(refusal.to_string()))?;
    Ok(spec)
}

/// Checks that the data plane can open a store, or create its file.
///
/// # Errors
/// Missing, not a file or block device, too small, or no space for it; with the next step.
pub fn check_store_path(spec: &StoreSpec) -> Result<(), CheckError> {
    let path = Path::new(&spec.path);
    let refuse = |text: String| Err(CheckError::Refused(text));
    match fs::metadata(path) {
        Ok(found) if found.file_type().is_block_device() => Ok(()),
        // An empty file is made as large as it is named; one with content is taken as it is.
        Ok(found) if found.is_file() && found.len() == 0 && spec.size > 0 => check_space(spec, path),
        Ok(found) if found.is_file() && found.len() < MIN_STORE_BYTES => refuse(format!(
            "store {} has {}, at least 64 MiB are needed; name a larger file, or PATH:SIZE to create one",
            spec.path,
            human(found.len())
        )),
        Ok(found) if found.is_file() => Ok(()),
        Ok(_) => refuse(format!("store {} is neither a file nor a block device", spec.path)),
        Err(error) if error.kind() == io::ErrorKind::NotFound && spec.size == 0 => refuse(format!(
            "store {} does not exist; check the path, or write {}:SIZE (for example :10GiB) to create a file",
            spec.path, spec.path
        )),
        Err(error) if error.kind() == io::ErrorKind::NotFound => check_space(spec, path),
        Err(source) => Err(CheckError::Io { what: format!("cannot look at store {}", spec.path), source }),
    }
}

/// Checks that a file of the named size can be made.
fn check_space(spec: &StoreSpec, path: &Path) -> Result<(), CheckError> {
    let folder = path.parent().unwrap_or(Path::new("/"));
    if !folder.is_dir() {
        let text = format!("store {}: the folder {} does not exist; create it", spec.path, folder.display());
        return Err(CheckError::Refused(text));
    }
    let space = rustix::fs::statvfs(folder)
        .map_err(|e| io_error(format!("cannot read the free space of {}", folder.display()))(e.into()))?;
    let free = space.f_bavail.saturating_mul(space.f_frsize);
    if free >= spec.size {
        return Ok(());
    }
    Err(CheckError::Refused(format!(
        "store {}: {} are named, but {} has {} free; name a smaller size",
        spec.path,
        human(spec.size),
        folder.display(),
        human(free)
    )))
}

/// Reads the cluster's key from a file that nobody else may read.
///
/// # Errors
/// The file cannot be read, others may read it, or it holds something else; what it holds is not said.
pub fn read_key(path: &Path) -> Result<ClusterKey, CheckError> {
    let refuse = |why: &str| Err(CheckError::Refused(format!("cluster key file {} {why}", path.display())));
    let cannot = || io_error(format!("cannot read the cluster key file {}", path.display()));
    let mut file = fs::File::open(path).map_err(cannot())?;
    if file.metadata().map_err(cannot())?.permissions().mode() & 0o077 != 0 {
        return refuse("can be read or written by others; run `chmod 600` on it");
    }
    let mut text = String::new();
    io::Read::by_ref(&mut file).take(128).read_to_string(&mut text).map_err(cannot())?;
    match parse_key(text.trim_end()) {
        Some(key) => Ok(key),
        None => refuse("does not hold 64 hexadecimal digits; make one with `openssl rand -hex 32`"),
    }
}

/// Where the data plane is to listen for peers, as `IP:PORT`: as named, else the address from which this machine reaches the
/// first of the etcd servers that it has a way to. Empty if there is none, or no etcd: such a node has no replicated volumes.
///
/// # Errors
/// What is named is no address, or there are not enough ports behind it for all cores.
pub fn peer_address(named: &str, etcd: &[String], cores: usize) -> Result<String, CheckError> {
    let refuse = |why: &str| {
        let text = format!(
            "\"{named}\" is not an address for peers: {why}; write IP or IP:PORT, for example 10.0.0.1:{PEER_PORT}"
        );
        Err(CheckError::Refused(text))
    };
    let addr = if named.is_empty() {
        let Some(ip) = etcd.iter().find_map(|url| address_towards(url)) else {
            if !etcd.is_empty() {
                tracing::warn!(
                    "no way to etcd yet: other nodes cannot call this one's data plane; name its address with --peer-addr"
                );
            }
            return Ok(String::new());
        };
        SocketAddr::new(ip, PEER_PORT)
    } else if let Ok(addr) = named.parse::<SocketAddr>() {
        addr
    } else if let Ok(ip) = named.trim_matches(['[', ']']).parse::<IpAddr>() {
        SocketAddr::new(ip, PEER_PORT)
    } else {
        return refuse("it does not parse");
    };
    if addr.ip().is_unspecified() || addr.ip().is_multicast() {
        return refuse("others cannot call it");
    }
    let ports = PeerAddr { ip: addr.ip(), base_port: addr.port() };
    if ports.has_ports_for(cores) { Ok(addr.to_string()) } else { refuse("each core needs a port") }
}

/// The address that this machine uses towards a server. Nothing is sent.
fn address_towards(url: &str) -> Option<IpAddr> {
    let url: hyper::Uri = url.parse().ok()?;
    let host = url.host()?.trim_matches(['[', ']']).to_owned();
    let server = (host, url.port_u16().unwrap_or(2379)).to_socket_addrs().ok()?.next()?;
    let any: IpAddr = if server.is_ipv4() { [0; 4].into() } else { [0; 16].into() };
    let socket = UdpSocket::bind((any, 0)).ok()?;
    socket.connect(server).ok()?;
    Some(socket.local_addr().ok()?.ip())
}

/// The data-plane program: the one named, else the one beside this program, else the first in `PATH`.
///
/// # Errors
/// None is found; says where was looked.
pub fn find_data_plane(named: Option<&Path>) -> Result<PathBuf, CheckError> {
    const NAME: &str = "torus-dataplane";
    if let Some(path) = named {
        if path.is_file() {
            return Ok(path.to_owned());
        }
        return Err(CheckError::Refused(format!("data plane {} does not exist", path.display())));
    }
    let beside = std::env::current_exe().ok().and_then(|exe| Some(exe.parent()?.join(NAME)));
    let in_path = std::env::var_os("PATH").unwrap_or_default();
    let mut places = beside.into_iter().chain(std::env::split_paths(&in_path).map(|dir| dir.join(NAME)));
    places.find(|path| path.is_file()).ok_or_else(|| {
        let text =
            format!("{NAME} is neither beside torusd nor in PATH; install it, or name it with --dataplane");
        CheckError::Refused(text)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::fs::OpenOptions;

    fn present(up: bool, mtu: u32) -> BTreeMap<String, Interface> {
        BTreeMap::from([("eth0".to_owned(), Interface { up, carrier: true, mtu })])
    }

    #[test]
    fn the_kernel_is_asked_for_interfaces() {
        let found = interfaces().unwrap();
        let lo = found.get("lo").unwrap();
        assert!(lo.mtu >= 1500, "{lo:?}");
    }

    #[test]
    fn interface_trouble_names_the_next_step() {
        let eth0 = ["eth0".to_owned()];
        assert!(check_interfaces(&eth0, &present(true, 1500)).is_ok());
        let text =
            |wanted: &[String], present: &_| check_interfaces(wanted, present).unwrap_err().to_string();
        assert_eq!(
            text(&["eth7".to_owned()], &present(true, 1500)),
            "there is no interface eth7 here; these exist: eth0"
        );
        assert_eq!(
            text(&eth0, &present(false, 1500)),
            "interface eth0 is down; run `ip link set dev eth0 up`"
        );
        assert!(text(&eth0, &present(true, 1059)).contains("MTU 1059"));
        assert!(check_interfaces(&eth0, &present(true, 1060)).is_ok());
        assert!(text(&[], &present(true, 1500)).contains("--interface"));
        assert!(text(&["eth0".into(), "eth0".into()], &present(true, 1500)).contains("twice"));
        assert!(text(&["eth0".into(), "eth0@4095".into()], &present(true, 1500)).contains("1 to 4094"));
        assert!(text(&["eth7@1".into()], &present(true, 1500)).contains("no interface eth7 here"));
        let both = check_interfaces(&["eth0".into(), "eth0@0100".into()], &present(true, 1500)).unwrap();
        assert_eq!(both.iter().map(ToString::to_string).collect::<Vec<_>>(), ["eth0", "eth0@100"]);
    }

    #[test]
    fn peers_call_the_address_towards_etcd_or_the_one_that_is_named() {
        let etcd = |url: &str| vec!["nonsense".to_owned(), url.to_owned()];
        assert_eq!(peer_address("", &etcd("http://127.0.0.1:2379"), 2).unwrap(), "127.0.0.1:4330");
        assert_eq!(peer_address("", &[], 2).unwrap(), "");
        assert_eq!(peer_address("", &["http://".into()], 2).unwrap(), "", "it can be named later");
        for (named, expected) in [
            ("10.0.0.1", "10.0.0.1:4330"),
            ("10.0.0.1:77", "10.0.0.1:77"),
            ("fd00::1", "[fd00::1]:4330"),
            ("[fd00::1]:77", "[fd00::1]:77"),
        ] {
            assert_eq!(peer_address(named, &etcd("http://127.0.0.1:2379"), 2).unwrap(), expected);
        }
        for bad in ["nonsense", "10.0.0.1:0", "10.0.0.1:65535", "0.0.0.0", "224.0.0.1:77", "10.0.0.1:x"] {
            let text = peer_address(bad, &[], 2).unwrap_err().to_string();
            assert!(text.contains(bad) && text.contains("IP:PORT"), "{text}");
        }
    }

    #[test]
    fn a_key_file_is_private_and_holds_a_key() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key");
        let read = |text: &str, mode| {
            fs::write(&path, text).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            read_key(&path).map_err(|error| error.to_string())
        };
        let good = "0123456789abcdefABCDEF0123456789".repeat(2);
        assert_eq!(read(&format!("{good}\n"), 0o600).unwrap().0[..3], [1, 0x23, 0x45]);
        assert!(read(&good, 0o640).unwrap_err().contains("chmod 600"));
        for bad in [String::new(), "0".repeat(64), good.clone() + "0", "é".repeat(100), good.repeat(100)] {
            let error = read(&bad, 0o600).unwrap_err();
            assert!(error.contains("openssl rand -hex 32") || error.contains("cannot read"), "{error}");
            assert!(bad.is_empty() || !error.contains(&bad));
        }
        fs::remove_file(&path).unwrap();
        assert!(read_key(&path).unwrap_err().to_string().contains("cannot read the cluster key file"));
    }

    #[test]
    fn capabilities_depend_on_the_link() {
        let raw = CapabilitySet::NET_RAW;
        assert!(missing_capabilities(LinkChoice::AfPacket, raw).is_empty());
        assert!(missing_capabilities(LinkChoice::Auto, raw).is_empty());
        assert_eq!(missing_capabilities(LinkChoice::AfXdp, raw).len(), 2);
        assert!(missing_capabilities(LinkChoice::AfXdp, CapabilitySet::all()).is_empty());
        assert!(missing_capabilities(LinkChoice::Auto, CapabilitySet::empty())[0].starts_with("CAP_NET_RAW"));
    }

    #[test]
    fn stores_parse_with_and_without_size() {
        let spec = |text| parse_store(text).unwrap();
        assert_eq!(spec("/x/y:1GiB"), StoreSpec { path: "/x/y".into(), size: 1 << 30 });
        assert_eq!(spec("/dev/sdz"), StoreSpec { path: "/dev/sdz".into(), size: 0 });
        assert_eq!(
            spec("/dev/disk/by-path/pci-0:ata"),
            StoreSpec { path: "/dev/disk/by-path/pci-0:ata".into(), size: 0 }
        );
        assert!(spec("rel:64MiB").path.starts_with('/'));
        for bad in ["", ":1GiB", "/x:0", "/x:63MiB", "/x:1Gobi"] {
            assert!(parse_store(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn store_paths_are_checked_and_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s").to_str().unwrap().to_owned();
        let check =
            |size| check_store_path(&StoreSpec { path: path.clone(), size }).map_err(|e| e.to_string());
        assert!(check(0).unwrap_err().contains("does not exist"));
        assert_eq!(check(64 << 20), Ok(()));
        assert!(check(1 << 60).unwrap_err().contains("smaller size"));
        assert!(!Path::new(&path).exists());
        fs::write(&path, b"").unwrap();
        assert!(check(0).unwrap_err().contains("has 0 B"));
        assert_eq!(check(64 << 20), Ok(()));
        fs::write(&path, b"short").unwrap();
        assert!(check(64 << 20).unwrap_err().contains("has 5 B"));
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(64 << 20).unwrap();
        assert_eq!(check(0), Ok(()));
        let folder = dir.path().to_str().unwrap().to_owned();
        assert!(check_store_path(&StoreSpec { path: folder, size: 0 }).is_err());
        assert!(check_store_path(&StoreSpec { path: format!("{path}/a/b"), size: 1 << 30 }).is_err());
    }

    proptest! {
        #[test]
        fn netlink_parsing_is_total(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = parse_links(&bytes, &mut BTreeMap::new());
        }

        #[test]
        fn netlink_parsing_ends_on_short_messages(len in 0u32..64, kind in 0u16..20, rest in 0usize..64) {
            let mut bytes = len.to_ne_bytes().to_vec();
            bytes.extend(kind.to_ne_bytes());
            bytes.resize(6 + rest, 1);
            let _ = parse_links(&bytes, &mut BTreeMap::new());
        }
    }
}
