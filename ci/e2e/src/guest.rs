//! A virtual machine with the real Linux initiator on the lab's bridge (`ci/vm shell`), and commands run in it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::{Lab, ci_dir};

/// How long a boot may take on a machine that does other things too.
const BOOT: Duration = Duration::from_secs(120);
/// How long a guest may take to switch itself off.
const SWITCH_OFF: Duration = Duration::from_secs(10);

/// The guest; switched off when dropped. Its functions are in `ci/vm-guest`.
#[derive(Debug)]
pub struct Guest {
    child: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    commands: u64,
}

impl Guest {
    /// Boots a guest with options of `ci/vm shell`, separated by `|` (their values have spaces).
    ///
    /// # Errors
    /// If it does not come up.
    pub fn boot(lab: &Lab, options: &str) -> Result<Self> {
        let mut child = Command::new(ci_dir().join("vm"))
            .arg("shell")
            .args(options.split('|').map(str::trim).filter(|option| !option.is_empty()))
            .arg("--log")
            .arg(lab.file("console.log"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot run ci/vm")?;
        let input = child.stdin.take().context("piped")?;
        let output = BufReader::new(child.stdout.take().context("piped")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            // The console ends its lines with CR LF, and may print bytes of no character set.
            for line in output.split(b'\n').map_while(Result::ok) {
                if sender.send(String::from_utf8_lossy(&line).trim_end().to_owned()).is_err() {
                    break;
                }
            }
        });
        let mut guest = Self { child, input, lines, commands: 0 };
        guest.until(BOOT, "the guest's boot", |line| (line == "STAGE shell").then_some(()))?;
        Ok(guest)
    }

    /// Runs a shell command in the guest; what it printed.
    ///
    /// # Errors
    /// If it fails, or does not end within `seconds`; the message has what it printed.
    pub fn sh(&mut self, seconds: u64, command: &str) -> Result<String> {
        let begun = Instant::now();
        let (code, out) = self.try_sh(seconds, command)?;
        ensure!(code == 0, "in the guest, `{command}` ended with {code}:\n{out}");
        if begun.elapsed() > Duration::from_secs(1) {
            println!("guest: {command}: ok, {} s", begun.elapsed().as_secs());
        }
        Ok(out)
    }

    /// Runs a shell command in the guest; its exit code and what it printed.
    ///
    /// # Errors
    /// If it does not end within `seconds`, or the guest ends.
    pub fn try_sh(&mut self, seconds: u64, command: &str) -> Result<(i32, String)> {
        self.commands += 1;
        let end = format!("DONE {} ", self.commands);
        writeln!(self.input, "{command}").context("the guest is gone")?;
        self.input.flush()?;
        let mut out = String::new();
        let code = self.until(Duration::from_secs(seconds), command, |line| {
            if let Some(text) = line.strip_prefix("OUT ") {
                out.push_str(text);
                out.push('\n');
            }
            line.strip_prefix(&end).and_then(|code| code.parse().ok())
        });
        Ok((code.with_context(|| format!("printed so far:\n{out}"))?, out))
    }

    /// A number that a command prints.
    ///
    /// # Errors
    /// If it fails or prints none.
    pub fn number(&mut self, command: &str) -> Result<u64> {
        let out = self.sh(60, command)?;
        out.trim().parse().with_context(|| format!("`{command}` printed no number: {out}"))
    }

    /// Starts a command that runs beside the next ones; [`Guest::finish`] ends it.
    ///
    /// # Errors
    /// If the guest is gone.
    pub fn start(&mut self, name: &str, command: &str) -> Result<()> {
        self.sh(60, &format!("start {name} {command}")).map(drop)
    }

    /// Waits until a started command ends; what it printed.
    ///
    /// # Errors
    /// As [`Guest::sh`].
    pub fn finish(&mut self, seconds: u64, name: &str) -> Result<String> {
        self.sh(seconds, &format!("result {name}"))
    }

    fn until<T>(
        &mut self,
        limit: Duration,
        what: &str,
        mut found: impl FnMut(&str) -> Option<T>,
    ) -> Result<T> {
        let end = Instant::now() + limit;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => {
                    if line.starts_with("FAIL ") || line.starts_with("KERNEL ") {
                        println!("guest: {line}");
                    }
                    if let Some(value) = found(&line) {
                        return Ok(value);
                    }
                }
                Err(RecvTimeoutError::Timeout) => bail!("not within {} s: {what}", limit.as_secs()),
                Err(RecvTimeoutError::Disconnected) => bail!("the guest ended during: {what}"),
            }
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        let _ = writeln!(self.input, "poweroff -f");
        let _ = self.input.flush();
        let end = Instant::now() + SWITCH_OFF;
        while Instant::now() < end {
            if matches!(self.child.try_wait(), Ok(Some(_))) {
                return;
            }
            sleep(Duration::from_millis(50));
        }
        // The script removes its guest and interfaces; killed outright it could not.
        let _ = Command::new("kill").args(["-TERM", &self.child.id().to_string()]).status();
        let _ = self.child.wait();
    }
}
