//! The data-plane process: started, adopted, watched, restarted; never interrupted.
//!
//! It runs in a session of its own and outlives this process. That it runs is told by the lock file it holds, so that a
//! restarted `torusd` finds it again and only watches it (by a pidfd, since it is nobody's child then). It is killed in one
//! case: when it was asked to drain and did not come to an end in time. Each start has a number of its own in the map
//! ([`crate::starts`]).

use std::fs::{self, File};
use std::io;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::ExitStatus;
use std::sync::Arc;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};
use rustix::fd::OwnedFd;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, PidfdFlags, Signal};
use tokio::process::Child;
use tokio::sync::watch;
use tokio::time::Instant;

use crate::starts::{StartError, Starts};

/// Code with which a data plane refuses its configuration.
pub const EXIT_CONFIG: i32 = 2;
/// Hidden first argument of `torusd`: become a session leader, then the program that follows.
pub const LAUNCH_ARGUMENT: &str = "launch-data-plane";

const BACKOFF_FIRST: Duration = Duration::from_millis(50);
/// Even one that was killed many times in a row is back within the three seconds of any fail-over (I8).
const BACKOFF_MOST: Duration = Duration::from_secs(2);
/// Uptime after which a data plane counts as healthy.
const HEALTHY_AFTER: Duration = Duration::from_secs(10);
/// How long draining may take before the process is killed. Acknowledged writes are durable, so nothing is lost (I3).
const DRAIN_LIMIT: Duration = Duration::from_secs(30);
/// How long a held lock may be without a valid process id in it.
const LOCK_SETTLE: Duration = Duration::from_secs(5);

/// How to start the data plane.
#[derive(Debug, Clone)]
pub struct Program {
    /// The executable.
    pub path: PathBuf,
    /// The shared map.
    pub map: PathBuf,
    /// The lock file that it holds while it runs.
    pub lock: PathBuf,
}

/// What is wanted of the supervisor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Wish {
    /// Watch a data plane that runs; start none.
    Watch,
    /// Keep one running.
    Run,
    /// It was told to drain: wait for its end.
    Drain,
}

/// How the data plane is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum DataPlane {
    /// Not started yet.
    Idle,
    /// Running.
    Running {
        /// Its process id.
        pid: u32,
        /// Found running, not started by this process.
        adopted: bool,
    },
    /// Ended; it will be started again.
    Restarting {
        /// How it ended.
        reason: String,
    },
    /// Ended as it was asked to.
    Stopped,
}

impl DataPlane {
    /// In words, for people.
    #[must_use]
    pub fn words(&self) -> String {
        match self {
            Self::Idle => "not started".into(),
            Self::Running { .. } => "running".into(),
            Self::Restarting { reason } => format!("restarting: {reason}"),
            Self::Stopped => "stopped".into(),
        }
    }

    /// Its process id, if it runs.
    #[must_use]
    pub fn pid(&self) -> Option<u32> {
        if let Self::Running { pid, .. } = self { Some(*pid) } else { None }
    }
}

/// How supervision ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// Drained, or never started.
    Stopped,
    /// Drained too slowly and was killed.
    Killed,
    /// It refused its configuration and said why.
    Refused,
}

/// Becomes a session leader and then `program`; returns only on failure. Called in the process that `torusd` starts.
#[must_use]
pub fn launch(program: &Path, arguments: &[std::ffi::OsString]) -> io::Error {
    // Fails only for a process group leader, which a fresh child is not.
    if let Err(error) = rustix::process::setsid() {
        return error.into();
    }
    std::process::Command::new(program).args(arguments).exec()
}

/// The process that holds the lock file, if any does.
///
/// # Errors
/// The lock is held, but by no process that can be seen.
pub async fn holder(lock: &Path) -> io::Result<Option<u32>> {
    let deadline = Instant::now() + LOCK_SETTLE;
    loop {
        let Some(text) = held(lock)? else { return Ok(None) };
        if let Some(pid) = text.trim().parse().ok().filter(|pid| has_open(*pid, lock)) {
            return Ok(Some(pid));
        }
        if Instant::now() > deadline {
            let text = format!(
                "{} is locked, but names no process that has it open (\"{}\"); find it with `fuser {}` and end it",
                lock.display(),
                text.trim().escape_default(),
                lock.display()
            );
            return Err(io::Error::other(text));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// The text in the lock file if somebody holds it.
fn held(lock: &Path) -> io::Result<Option<String>> {
    let file = match File::open(lock) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    // Taken for an instant: only a torusd starts data planes, and this is the only torusd here.
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockShared) {
        Ok(()) => Ok(None),
        Err(rustix::io::Errno::WOULDBLOCK) => {
            Ok(Some(String::from_utf8_lossy(&fs::read(lock)?).into_owned()))
        }
        Err(error) => Err(error.into()),
    }
}

fn has_open(pid: u32, path: &Path) -> bool {
    let Ok(wanted) = fs::canonicalize(path) else { return false };
    let Ok(files) = fs::read_dir(format!("/proc/{pid}/fd")) else { return false };
    files.flatten().any(|fd| fs::read_link(fd.path()).is_ok_and(|target| target == wanted))
}

/// A running data plane.
enum Process {
    Child(Child),
    Adopted { pidfd: Arc<OwnedFd>, ended: watch::Receiver<bool> },
}

impl Process {
    async fn adopt(lock: &Path) -> io::Result<Option<(u32, Self)>> {
        let Some(pid) = holder(lock).await? else { return Ok(None) };
        let raw = i32::try_from(pid).ok().and_then(Pid::from_raw);
        let raw = raw.ok_or_else(|| io::Error::other("bad process id"))?;
        let fd = match rustix::process::pidfd_open(raw, PidfdFlags::NONBLOCK) {
            Ok(fd) => fd,
            Err(rustix::io::Errno::SRCH) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        // The id could have passed to another process before the pidfd was had.
        if !has_open(pid, lock) {
            return Ok(None);
        }
        Ok(Some((pid, Self::watched(Arc::new(fd)))))
    }

    /// A thread waits for its end: a pidfd is readable from then on.
    fn watched(pidfd: Arc<OwnedFd>) -> Self {
        let (tell, ended) = watch::channel(false);
        let watched = Arc::clone(&pidfd);
        std::thread::spawn(move || {
            let mut poll = [PollFd::new(&watched, PollFlags::IN)];
            while matches!(rustix::event::poll(&mut poll, None), Err(rustix::io::Errno::INTR)) {}
            tell.send_replace(true);
        });
        Self::Adopted { pidfd, ended }
    }

    fn start(program: &Program) -> io::Result<(u32, Self)> {
        let child = tokio::process::Command::new("/proc/self/exe")
            .arg(LAUNCH_ARGUMENT)
            .arg(&program.path)
            .args(["run".as_ref(), "--map".as_ref(), program.map.as_os_str()])
            .args(["--lock".as_ref(), program.lock.as_os_str()])
            .stdin(std::process::Stdio::null())
            .spawn()?;
        let pid = child.id().ok_or_else(|| io::Error::other("the process ended at once"))?;
        Ok((pid, Self::Child(child)))
    }

    /// Waits for its end; the status is known of children only. Cancel safe.
    async fn ended(&mut self) -> Option<ExitStatus> {
        match self {
            Self::Child(child) => child.wait().await.ok(),
            Self::Adopted { ended, .. } => {
                // An error means that the watching thread is gone, which ends with the process only.
                let _ = ended.wait_for(|ended| *ended).await;
                None
            }
        }
    }

    fn kill(&mut self) -> io::Result<()> {
        match self {
            Self::Child(child) => child.start_kill(),
            Self::Adopted { pidfd, .. } => Ok(rustix::process::pidfd_send_signal(pidfd, Signal::KILL)?),
        }
    }
}

fn describe(status: Option<ExitStatus>) -> String {
    match status {
        None => "it ended".into(),
        Some(status) => match (status.code(), status.signal()) {
            (Some(code), _) => format!("it ended with code {code}"),
            (None, Some(signal)) => format!("it was killed by signal {signal}"),
            (None, None) => "it ended".into(),
        },
    }
}

/// Supervises until the data plane has drained or refused its configuration. Dropping the future leaves the process alone.
///
/// # Errors
/// The lock is held by a process that cannot be seen.
pub async fn run(
    program: &Program,
    starts: &mut Starts,
    mut wish: watch::Receiver<Wish>,
    state: &watch::Sender<DataPlane>,
) -> io::Result<Ended> {
    let mut backoff = BACKOFF_FIRST;
    let mut proved = false;
    loop {
        let adopted = Process::adopt(&program.lock).await?;
        let (pid, mut process) = match adopted {
            Some((pid, process)) => {
                tracing::info!(pid, "re-attached to the running data plane");
                state.send_replace(DataPlane::Running { pid, adopted: true });
                proved = true;
                (pid, process)
            }
            None => {
                let numbered = match wait_for_start(&mut wish).await {
                    Wish::Drain => None,
                    Wish::Run | Wish::Watch => number_start(starts, &mut wish).await,
                };
                let Some(numbered) = numbered else {
                    state.send_replace(DataPlane::Stopped);
                    return Ok(Ended::Stopped);
                };
                let number = match numbered {
                    Ok(number) => number,
                    Err(error) => {
                        pause(&mut backoff, error.to_string(), &mut wish, state).await;
                        continue;
                    }
                };
                match Process::start(program) {
                    Ok((pid, process)) => {
                        tracing::info!(pid, start = number, program = %program.path.display(), "started the data plane");
                        state.send_replace(DataPlane::Running { pid, adopted: false });
                        (pid, process)
                    }
                    Err(error) => {
                        let reason = format!("cannot start {}: {error}", program.path.display());
                        pause(&mut backoff, reason, &mut wish, state).await;
                        continue;
                    }
                }
            }
        };
        let since = Instant::now();
        let end = watch_process(&mut process, &mut wish).await;
        if end.drained {
            tracing::info!(pid, killed = end.killed, "the data plane has stopped");
            state.send_replace(DataPlane::Stopped);
            return Ok(if end.killed { Ended::Killed } else { Ended::Stopped });
        }
        proved |= since.elapsed() >= HEALTHY_AFTER;
        if end.status.and_then(|s| s.code()) == Some(EXIT_CONFIG) && !proved {
            // Unless it only found another one running, which is then adopted.
            if holder(&program.lock).await?.is_none() {
                state.send_replace(DataPlane::Stopped);
                return Ok(Ended::Refused);
            }
        }
        if since.elapsed() >= HEALTHY_AFTER {
            backoff = BACKOFF_FIRST;
        }
        pause(&mut backoff, describe(end.status), &mut wish, state).await;
    }
}

async fn wait_for_start(wish: &mut watch::Receiver<Wish>) -> Wish {
    // A closed channel means that the daemon is ending: nothing is to be started.
    wish.wait_for(|wish| *wish != Wish::Watch).await.map_or(Wish::Drain, |wish| *wish)
}

/// A number for a start; `None` if nothing is to be started any more.
async fn number_start(
    starts: &mut Starts,
    wish: &mut watch::Receiver<Wish>,
) -> Option<Result<u64, StartError>> {
    let stop = async {
        // Nobody can stop it any more: what is wanted last stays.
        if wish.wait_for(|wish| *wish == Wish::Drain).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        numbered = starts.next() => Some(numbered),
        () = stop => None,
    }
}

async fn pause(
    backoff: &mut Duration,
    reason: String,
    wish: &mut watch::Receiver<Wish>,
    state: &watch::Sender<DataPlane>,
) {
    tracing::warn!(%reason, restart_in_ms = u64::try_from(backoff.as_millis()).unwrap_or(u64::MAX), "the data plane is not running");
    state.send_replace(DataPlane::Restarting { reason });
    let stop = wish.wait_for(|wish| *wish == Wish::Drain);
    let _ = tokio::time::timeout(*backoff, stop).await;
    *backoff = (*backoff * 2).min(BACKOFF_MOST);
}

struct End {
    status: Option<ExitStatus>,
    drained: bool,
    killed: bool,
}

/// Waits for the process's end, by itself or within the drain limit.
async fn watch_process(process: &mut Process, wish: &mut watch::Receiver<Wish>) -> End {
    let draining = async {
        if wish.wait_for(|wish| *wish == Wish::Drain).await.is_err() {
            std::future::pending::<()>().await;
        }
    };
    tokio::select! {
        status = process.ended() => return End { status, drained: false, killed: false },
        () = draining => {}
    }
    if let Ok(status) = tokio::time::timeout(DRAIN_LIMIT, process.ended()).await {
        return End { status, drained: true, killed: false };
    }
    tracing::error!(
        "the data plane did not drain within {DRAIN_LIMIT:?}: killing it (acknowledged writes are durable)"
    );
    if let Err(error) = process.kill() {
        tracing::error!(%error, "cannot kill the data plane");
    }
    End { status: process.ended().await, drained: true, killed: true }
}
