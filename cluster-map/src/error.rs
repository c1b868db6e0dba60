//! What can be wrong with a map, and what to do about it.

use std::io;
use std::path::PathBuf;

/// The two processes that share a map; each writes its own area and nothing else.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// torusd.
    Control,
    /// torus-dataplane.
    DataPlane,
}

impl std::fmt::Display for Role {
    fn fmt(&self, out: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        out.write_str(match self {
            Self::Control => "control process (torusd)",
            Self::DataPlane => "data plane (torus-dataplane)",
        })
    }
}

/// Why a map cannot be created, attached, written or read. Each message ends with the next step.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MapError {
    /// A system call failed.
    #[error("cannot {action} {path}: {source}; its directory must be a writable memory file system, and torusd makes the map", path = path.display())]
    Io {
        /// What was attempted.
        action: &'static str,
        /// The map's file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The memory file system has no room for the pages that would be written.
    #[error("no memory left for {path} ({bytes} bytes needed): enlarge or empty its file system", path = path.display())]
    NoSpace {
        /// The map's file.
        path: PathBuf,
        /// How many bytes were to be reserved.
        bytes: u64,
    },
    /// The file is something else.
    #[error("{path} is not a Torus map: remove it, or choose another run directory", path = path.display())]
    NotAMap {
        /// The file.
        path: PathBuf,
    },
    /// The file, or a version in it, has a layout level that this program does not speak.
    #[error(
        "{path} has layout level {found}, to be read by level {lowest_reader} or newer; this program speaks {}: \
         restart both torusd and torus-dataplane from one release",
        spoken(*supported), path = path.display()
    )]
    Level {
        /// The map's file.
        path: PathBuf,
        /// The level that was found.
        found: u32,
        /// The lowest level that can read what was found.
        lowest_reader: u32,
        /// This program's level.
        supported: u32,
    },
    /// The content contradicts itself.
    #[error("{path} is damaged ({what}): stop torusd and torus-dataplane, remove it and start torusd", path = path.display())]
    Corrupt {
        /// The map's file.
        path: PathBuf,
        /// What contradicts what.
        what: String,
    },
    /// The machine was restarted since the map was made: its clocks and processes are gone.
    #[error("{path} is from an earlier boot of this machine: start torusd, which makes a new one", path = path.display())]
    EarlierBoot {
        /// The map's file.
        path: PathBuf,
    },
    /// A process that still lives has the role that was asked for, or uses the map that was to be replaced.
    #[error("{path} is in use by another {role}: stop that process first", path = path.display())]
    InUse {
        /// The map's file.
        path: PathBuf,
        /// The role that is taken.
        role: Role,
    },
    /// The state to publish does not fit.
    #[error("{bytes} bytes do not fit into the {capacity} bytes of a slot: create the map with larger slots")]
    TooBig {
        /// Encoded size.
        bytes: u64,
        /// What a slot holds.
        capacity: u64,
    },
    /// The state to publish, or the geometry asked for, breaks a rule.
    #[error("refused: {what}")]
    Invalid {
        /// The rule and what broke it.
        what: String,
    },
    /// The writer replaced the state as fast as it was being read.
    #[error("the state changed during every attempt to read it: read again")]
    Busy,
    /// The version went backwards: somebody other than the one writer changed the map.
    #[error("{path} went back from version {seen} to {found}: restart both torusd and torus-dataplane", path = path.display())]
    Backward {
        /// The map's file.
        path: PathBuf,
        /// The newest version seen before.
        seen: u64,
        /// The version found now.
        found: u64,
    },
    /// The map has no statistics for that core, or another handle writes them.
    #[error("statistics of core {core} cannot be had: {why}")]
    Core {
        /// Index of the core, from 0.
        core: u16,
        /// Why not.
        why: &'static str,
    },
}

fn spoken(level: u32) -> String {
    if level > 1 { format!("levels {} and {level}", level - 1) } else { format!("level {level}") }
}

/// What is wrong with bytes whose file is not known; see [`MapError`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Fault {
    NotAMap,
    Level { found: u32, lowest_reader: u32, supported: u32 },
    Corrupt(String),
}

impl Fault {
    pub(crate) fn corrupt(what: impl Into<String>) -> Self {
        Self::Corrupt(what.into())
    }

    /// Names the file that the bytes came from.
    pub(crate) fn at(self, path: impl Into<PathBuf>) -> MapError {
        let path = path.into();
        match self {
            Self::NotAMap => MapError::NotAMap { path },
            Self::Level { found, lowest_reader, supported } => {
                MapError::Level { path, found, lowest_reader, supported }
            }
            Self::Corrupt(what) => MapError::Corrupt { path, what },
        }
    }
}
