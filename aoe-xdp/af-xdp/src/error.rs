//! Errors of this crate: what was tried, what the kernel said, and which privilege is missing.

use std::fmt;
use std::io;

/// A Linux capability (capabilities(7)) whose absence explains a refusal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Capability {
    /// `CAP_NET_RAW`: AF_XDP and AF_PACKET sockets.
    NetRaw,
    /// `CAP_NET_ADMIN`: attaching an XDP program, forced socket buffers, promiscuous mode.
    NetAdmin,
    /// `CAP_BPF`: loading BPF maps and programs (with `CAP_NET_ADMIN` for XDP programs).
    Bpf,
    /// `CAP_IPC_LOCK`: pinning more memory than `RLIMIT_MEMLOCK` allows.
    IpcLock,
}

impl Capability {
    /// Its number, include/uapi/linux/capability.h.
    const fn bit(self) -> u32 {
        match self {
            Self::NetAdmin => 12,
            Self::NetRaw => 13,
            Self::IpcLock => 14,
            Self::Bpf => 39,
        }
    }

    /// The first of `needed` that this thread has not; the first of all where it has them, so that a
    /// refusal for another reason (a security module, a user namespace) still names what it is about.
    fn missing_of(needed: &[Self]) -> Self {
        let held = held_capabilities();
        let is_missing = |capability: &&Self| held & (1 << capability.bit()) == 0;
        needed.iter().find(is_missing).copied().unwrap_or(needed[0])
    }
}

/// The calling thread's effective capabilities, one bit each; none where the kernel does not say.
fn held_capabilities() -> u64 {
    const VERSION_3: u32 = 0x2008_0522;
    const SYS_ADMIN: u32 = 21;
    let mut header = [VERSION_3, 0];
    // Effective, permitted and inheritable, for the low and then the high 32 capabilities.
    let mut data = [0u32; 6];
    // SAFETY: the two structures of capget(2) version 3, writable.
    let result = unsafe { libc::syscall(libc::SYS_capget, header.as_mut_ptr(), data.as_mut_ptr()) };
    if result != 0 {
        return 0;
    }
    let held = u64::from(data[0]) | u64::from(data[3]) << 32;
    // CAP_SYS_ADMIN includes CAP_BPF.
    if held & (1 << SYS_ADMIN) == 0 { held } else { held | 1 << Capability::Bpf.bit() }
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NetRaw => "CAP_NET_RAW",
            Self::NetAdmin => "CAP_NET_ADMIN",
            Self::Bpf => "CAP_BPF",
            Self::IpcLock => "CAP_IPC_LOCK",
        })
    }
}

/// Why the kernel, or the machine, refused.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A privilege is missing.
    #[error("{action} needs {capability}: run as root or grant that capability")]
    Privilege {
        /// What was tried.
        action: &'static str,
        /// What is missing.
        capability: Capability,
        /// What the kernel said.
        source: io::Error,
    },
    /// A system call failed.
    #[error("{action}: {source}")]
    Os {
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel's verifier refused the XDP program.
    #[error("the kernel's verifier refused the XDP program: {source}: {log}")]
    Verifier {
        /// What the kernel said.
        source: io::Error,
        /// The last lines of the verifier's log.
        log: String,
    },
    /// No interface of that name in this network namespace.
    #[error("there is no network interface {name:?} in this network namespace: see `ip link`")]
    UnknownInterface {
        /// The name asked for.
        name: String,
    },
    /// A reply of the kernel is shorter than its format, or contradicts itself.
    #[error("{what}: malformed reply of the kernel")]
    Malformed {
        /// Which reply.
        what: &'static str,
    },
}

impl Error {
    /// The last system error, as a failure of `action`.
    pub(crate) fn last(action: &'static str) -> Self {
        Self::Os { action, source: io::Error::last_os_error() }
    }

    /// A failure of `action`; where the system says that a privilege is missing, names the one of `needed`.
    pub(crate) fn privileged(action: &'static str, needed: &[Capability], source: io::Error) -> Self {
        match source.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => {
                Self::Privilege { action, capability: Capability::missing_of(needed), source }
            }
            _ => Self::Os { action, source },
        }
    }

    /// The system's error number behind this error, where there is one.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::Privilege { source, .. } | Self::Os { source, .. } | Self::Verifier { source, .. } => {
                source.raw_os_error()
            }
            Self::UnknownInterface { .. } | Self::Malformed { .. } => None,
        }
    }

    /// Whether somebody else has it, or a process that just ended had it a moment ago: the kernel takes an
    /// AF_XDP socket apart after its process is gone.
    pub fn is_busy(&self) -> bool {
        self.errno() == Some(libc::EBUSY)
    }

    /// The capability that is missing, where that is the reason.
    pub fn missing_capability(&self) -> Option<Capability> {
        match self {
            Self::Privilege { capability, .. } => Some(*capability),
            _ => None,
        }
    }
}
