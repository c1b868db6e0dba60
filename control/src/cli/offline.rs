//! `torusctl store format`, `check` and `dump`: work on a store that no node has open.
//!
//! The data plane knows what a store looks like, so its program does it. What is given is passed on as it is; this process
//! becomes that program, so that input, output, signals and exit code are its own.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

use clap::{Subcommand, ValueHint};

use super::CliError;
use crate::checks::find_data_plane;

/// What is done to a store that no node has open.
#[derive(Debug, Subcommand)]
pub(super) enum OfflineCommand {
    /// Format a store on this machine that no node has open
    #[command(
        override_usage = "torusctl store format <PATH> --cluster <UUID> [--size <SIZE>] [--shards <N>] [--force]",
        after_help = "\
Options, which torus-dataplane reads:
  --cluster UUID   The cluster that the store is for: see `torusctl status`
  --size SIZE      Size to create a missing file with, such as 10GiB
  --shards N       Virtual shards: the most cores that can share the store
  --force          Format it even if something is on it, which is lost

torusd formats a blank store by itself; this is for one that is not to wait for it, or is not blank.

Examples:
  torusctl store format /dev/nvme1n1 --cluster 7d0a5c9e-2f3b-4a61-8a55-0c1f2e3d4b5a
  torusctl store format /srv/torus/store --size 10GiB --shards 8 --cluster 7d0a5c9e-2f3b-4a61-8a55-0c1f2e3d4b5a"
    )]
    Format(PassedOn),
    /// Check a store on this machine that no node has open; nothing is written
    #[command(
        override_usage = "torusctl store check <PATH> [--data] [--json]",
        after_help = "\
Options, which torus-dataplane reads:
  --data   Read all data too and compare it with its checksums, not only the metadata
  --json   Print what is found as JSON

It only reads: nothing is repaired.

Examples:
  torusctl store check /dev/nvme1n1
  torusctl store check /srv/torus/store --data --json"
    )]
    Check(PassedOn),
    /// Print what a store on this machine holds; nothing is written
    #[command(
        override_usage = "torusctl store dump <PATH> [--journal] [--volume <UUID>] [--json]",
        after_help = "\
Options, which torus-dataplane reads:
  --journal       The entries of the journal too
  --volume UUID   Only this volume: where its extents lie
  --json          Print it as JSON

Examples:
  torusctl store dump /dev/nvme1n1
  torusctl store dump /srv/torus/store --journal --volume 0b9de0a1-54a3-4f0b-9d0e-6f2b8f1c7a11"
    )]
    Dump(PassedOn),
}

/// Words for another program.
#[derive(Debug, clap::Args)]
pub(super) struct PassedOn {
    /// File or block device, then options
    #[arg(
        value_name = "PATH",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true,
        value_hint = ValueHint::AnyPath
    )]
    words: Vec<OsString>,
}

/// Becomes the data plane's program; returns only if that fails.
pub(super) fn run(command: &OfflineCommand, json: bool) -> CliError {
    let Ok(program) = find_data_plane(None) else {
        return CliError::Failed(
            "torus-dataplane, which knows what a store looks like, is neither beside torusctl nor in PATH; install it \
             there"
                .into(),
        );
    };
    let error = Command::new(&program).args(arguments(command, json)).exec();
    CliError::Failed(format!(
        "cannot run {}: {error}; install the torus-dataplane of this version",
        program.display()
    ))
}

/// What the program is given. A `--json` that stands before the path was taken for torusctl's own.
fn arguments(command: &OfflineCommand, json: bool) -> Vec<OsString> {
    let (verb, passed_on) = match command {
        OfflineCommand::Format(words) => ("format", words),
        OfflineCommand::Check(words) => ("check", words),
        OfflineCommand::Dump(words) => ("dump", words),
    };
    let own = ["store", verb].into_iter().map(OsString::from);
    let given = passed_on.words.iter().cloned();
    own.chain(json.then(|| "--json".into())).chain(given).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Parser)]
    struct Tool {
        #[arg(long, global = true)]
        json: bool,
        #[command(subcommand)]
        command: OfflineCommand,
    }

    #[test]
    fn words_are_passed_on_as_they_are() {
        for (given, passed) in [
            ("check /s --data --json", "check /s --data --json"),
            ("check --json /s", "check --json /s"),
            ("format --force /s --size 1GiB -x -- y", "format --force /s --size 1GiB -x -- y"),
            ("dump /s --journal --help --version", "dump /s --journal --help --version"),
            ("dump --volume v /s", "dump --volume v /s"),
        ] {
            let tool = Tool::try_parse_from(["torusctl"].into_iter().chain(given.split(' '))).unwrap();
            let words = arguments(&tool.command, tool.json);
            let expected: Vec<_> = std::iter::once("store").chain(passed.split(' ')).collect();
            assert_eq!(words, expected, "{given}");
        }
        assert!(Tool::try_parse_from(["torusctl", "check"]).is_err());
    }
}
