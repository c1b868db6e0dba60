//! `torusctl scrub`: has stores read all that they hold and compare it with its checksums.

use std::io::{self, IsTerminal};
use std::time::Instant;

use clap::{Args, Subcommand};
use hyper::Method;
use indicatif::ProgressBar;
use serde::Serialize;

use super::{
    CliError, Done, EXPORT_LIMIT, POLL, QUICK, dash, fields, print, print_json, progress_bar, staleness,
    table,
};
use crate::api::types as t;
use crate::client::{Client, segment};
use crate::node::rfc3339;
use crate::size::{self, human};

/// What is done with scrubs.
#[derive(Debug, Subcommand)]
pub(super) enum ScrubCommand {
    /// Begin a scrub; while one runs, change its rate
    #[command(after_help = "\
Examples:
  torusctl scrub start /dev/nvme0n1
  torusctl scrub start --all --rate 100MiB
  torusctl scrub start /dev/nvme0n1 --wait && echo all is well

With --wait the exit code is 1 if a damaged block was found, or if a scrub does not come to its end.")]
    Start {
        #[command(flatten)]
        which: Which,
        /// Most to read in a second [default: 64MiB for a new scrub, unchanged for a running one]
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        rate: Option<u64>,
        /// Wait until it is finished
        #[arg(long)]
        wait: bool,
    },
    /// Stop a scrub where it is; it can be resumed
    #[command(after_help = "Examples:\n  torusctl scrub stop /dev/nvme0n1\n  torusctl scrub stop --all")]
    Stop {
        #[command(flatten)]
        which: Which,
    },
    /// Go on with a scrub that was stopped, where it was
    #[command(
        after_help = "Examples:\n  torusctl scrub resume /dev/nvme0n1\n  torusctl scrub resume --all --rate 20MiB"
    )]
    Resume {
        #[command(flatten)]
        which: Which,
        /// Most to read in a second from now on
        #[arg(long, value_name = "SIZE", value_parser = size::parse)]
        rate: Option<u64>,
        /// Wait until it is finished
        #[arg(long)]
        wait: bool,
    },
    /// Show how far scrubs are and what they found
    #[command(
        after_help = "Examples:\n  torusctl scrub status\n  torusctl scrub status /dev/nvme0n1\n  torusctl scrub status --json"
    )]
    Status {
        /// Path or id of a store; all if none is given
        #[arg(value_name = "STORE")]
        store: Option<String>,
    },
}

/// Which stores.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub(super) struct Which {
    /// Path or id of the store; a path only if one node alone has it
    #[arg(value_name = "STORE")]
    store: Option<String>,
    /// All stores of the cluster to which it applies
    #[arg(long)]
    all: bool,
}

pub(super) async fn run(client: &Client, json: bool, command: ScrubCommand) -> Done {
    match command {
        ScrubCommand::Start { which, rate, wait } => {
            let stores = named(client, &which, |store| !store.id.is_empty()).await?;
            begin(client, json, stores, rate, false, wait).await
        }
        ScrubCommand::Resume { which, rate, wait } => {
            let stores = named(client, &which, |store| is_in(store, &["stopped"])).await?;
            begin(client, json, stores, rate, true, wait).await
        }
        ScrubCommand::Stop { which } => {
            let going = &["running", "waiting", "unknown"];
            let stores = named(client, &which, |store| is_in(store, going)).await?;
            let mut stopped = Vec::new();
            for store in &stores {
                stopped.push(client.request(Method::DELETE, &path(store), None::<&()>).await?);
            }
            told(json, &stopped, |scrub| {
                format!("is stopped: `torusctl scrub resume` goes on with run {}", scrub.run)
            })
        }
        ScrubCommand::Status { store: None } => {
            let list: t::StoreList = client.get("/v1/stores").await?;
            if json {
                return print_json(&list);
            }
            staleness(&list.metadata);
            print(&scrub_table(&list.stores))
        }
        ScrubCommand::Status { store: Some(store) } => {
            let answer: t::ScrubAnswer = client.get(&path(&store)).await?;
            if json {
                return print_json(&answer);
            }
            staleness(&answer.metadata);
            print(&shown(&answer.store))
        }
    }
}

fn path(store: &str) -> String {
    format!("/v1/stores/{}/scrub", segment(store))
}

fn is_in(store: &t::Store, states: &[&str]) -> bool {
    store.scrub.as_ref().is_some_and(|scrub| states.contains(&scrub.state.as_str()))
}

/// The store that is named or, with `--all`, the ids of those to which it applies.
async fn named(
    client: &Client,
    which: &Which,
    applies: impl Fn(&t::Store) -> bool,
) -> Result<Vec<String>, CliError> {
    match &which.store {
        Some(store) => Ok(vec![store.clone()]),
        None => {
            let list: t::StoreList = client.get("/v1/stores").await?;
            Ok(list.stores.into_iter().filter(applies).map(|store| store.id).collect())
        }
    }
}

async fn begin(
    client: &Client,
    json: bool,
    stores: Vec<String>,
    rate: Option<u64>,
    resume: bool,
    wait: bool,
) -> Done {
    let request = t::ScrubRequest { rate: rate.map(t::ScrubRate::Bytes), resume };
    let mut begun: Vec<t::ScrubAnswer> = Vec::new();
    for store in &stores {
        begun.push(client.request(Method::POST, &path(store), Some(&request)).await?);
    }
    if !wait {
        return told(json, &begun, |scrub| {
            let rate = human(scrub.rate_bytes_per_s);
            format!("is {}: run {}, at most {rate}/s; see `torusctl scrub status`", scrub.state, scrub.run)
        });
    }
    let mut ended = Vec::new();
    for answer in &begun {
        ended.push(follow(client, answer).await?);
    }
    told(json, &ended, |scrub| {
        format!("is finished: {} read, {} damaged block(s)", human(scrub.done_bytes), scrub.errors)
    })?;
    let damaged: Vec<_> =
        ended.iter().filter(|a| a.store.scrub.as_ref().is_none_or(|scrub| scrub.errors > 0)).collect();
    match damaged.as_slice() {
        [] => Ok(()),
        [first, ..] => Err(CliError::Failed(format!(
            "damaged blocks were found in {} of {} store(s), such as {} of node {}; see `torusctl store list` for what \
             is lost",
            damaged.len(),
            ended.len(),
            first.store.path,
            first.store.node
        ))),
    }
}

/// Follows a run to its end.
async fn follow(client: &Client, begun: &t::ScrubAnswer) -> Result<t::ScrubAnswer, CliError> {
    let store = &begun.store;
    let run = begun.store.scrub.as_ref().map_or(0, |scrub| scrub.run);
    let started = Instant::now();
    let mut moved = started;
    let mut bar: Option<ProgressBar> = None;
    let end = loop {
        let answer: t::ScrubAnswer = match client.get(&path(&store.id)).await {
            Ok(answer) => answer,
            Err(error) => break Err(error.into()),
        };
        let failed = |what: String| {
            CliError::Failed(format!("the scrub of {} on node {} {what}", store.path, store.node))
        };
        let Some(scrub) = answer.store.scrub.as_ref().filter(|scrub| scrub.run == run) else {
            break Err(failed("was replaced by another run; see `torusctl scrub status`".into()));
        };
        match scrub.state.as_str() {
            "finished" => break Ok(answer),
            "running" => moved = Instant::now(),
            "stopped" => {
                let done = format!("{} of {}", human(scrub.done_bytes), human(scrub.total_bytes));
                break Err(failed(format!("was stopped at {done}; `torusctl scrub resume` goes on")));
            }
            state if moved.elapsed() > EXPORT_LIMIT => {
                let limit = EXPORT_LIMIT.as_secs();
                break Err(failed(format!(
                    "is {state} for {limit} s; it goes on when the store can be used: see `torusctl node show {}`",
                    store.node
                )));
            }
            _ => {}
        }
        if started.elapsed() > QUICK && io::stderr().is_terminal() {
            let bar = bar
                .get_or_insert_with(|| progress_bar(scrub.total_bytes, format!("scrubbing {}", store.path)));
            bar.set_length(scrub.total_bytes);
            bar.set_position(scrub.done_bytes);
        }
        tokio::time::sleep(POLL).await;
    };
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    end
}

/// Says of each store what its scrub is, or prints the answers.
fn told(json: bool, answers: &[t::ScrubAnswer], what: impl Fn(&t::Scrub) -> String) -> Done {
    #[derive(Serialize)]
    struct All<'a> {
        scrubs: &'a [t::ScrubAnswer],
    }
    match (json, answers) {
        (true, [one]) => print_json(one),
        (true, all) => print_json(&All { scrubs: all }),
        (false, []) => print("nothing to do: there is no such store\n"),
        (false, all) => {
            let line = |answer: &t::ScrubAnswer| {
                let store = &answer.store;
                let what = store.scrub.as_ref().map(&what).unwrap_or_default();
                format!("the scrub of {} on node {} {what}\n", store.path, store.node)
            };
            print(&all.iter().map(line).collect::<String>())
        }
    }
}

fn percent(scrub: &t::Scrub) -> String {
    if scrub.total_bytes == 0 {
        return "-".into();
    }
    format!("{} %", u128::from(scrub.done_bytes.min(scrub.total_bytes)) * 100 / u128::from(scrub.total_bytes))
}

/// A scrub in a few words, for tables of stores.
pub(super) fn brief(scrub: &t::Scrub) -> String {
    let errors = if scrub.errors > 0 { format!(", {} damaged", scrub.errors) } else { String::new() };
    match scrub.state.as_str() {
        state @ ("running" | "stopped") => format!("{state} {}{errors}", percent(scrub)),
        state => format!("{state}{errors}"),
    }
}

fn scrub_table(stores: &[t::Store]) -> String {
    let row = |store: &t::Store| {
        let of = |text: &dyn Fn(&t::Scrub) -> String| store.scrub.as_ref().map_or_else(|| "-".into(), text);
        vec![
            store.node.clone(),
            store.path.clone(),
            store.scrub.as_ref().map_or_else(|| "never".into(), |scrub| scrub.state.clone()),
            of(&|scrub| scrub.run.to_string()),
            of(&percent),
            of(&|scrub| human(scrub.done_bytes)),
            of(&|scrub| human(scrub.total_bytes)),
            of(&|scrub| format!("{}/s", human(scrub.rate_bytes_per_s))),
            of(&|scrub| scrub.errors.to_string()),
            of(&|scrub| rfc3339(scrub.started_unix_s)),
            of(&|scrub| scrub.finished_unix_s.map_or_else(|| "-".into(), rfc3339)),
            dash(&store.id),
        ]
    };
    let header = [
        "node",
        "store",
        "scrub",
        "run",
        "percent",
        "done",
        "total",
        "rate",
        "errors",
        "asked for",
        "finished",
        "id",
    ];
    table(&header, &[3, 4, 5, 6, 7, 8], stores.iter().map(row).collect())
}

fn shown(store: &t::Store) -> String {
    let scrub = store.scrub.as_ref();
    let of = |text: &dyn Fn(&t::Scrub) -> String| scrub.map(text).unwrap_or_default();
    let done = |scrub: &t::Scrub| {
        format!("{} of {} ({})", human(scrub.done_bytes), human(scrub.total_bytes), percent(scrub))
    };
    fields(&[
        ("store", store.path.clone()),
        ("id", store.id.clone()),
        ("node", store.node.clone()),
        ("store is", store.state.clone()),
        ("scrub", scrub.map_or_else(|| "never".into(), |scrub| scrub.state.clone())),
        ("run", of(&|scrub| scrub.run.to_string())),
        ("done", of(&done)),
        ("rate", of(&|scrub| format!("{}/s", human(scrub.rate_bytes_per_s)))),
        ("damaged blocks", of(&|scrub| scrub.errors.to_string())),
        ("asked for", of(&|scrub| rfc3339(scrub.started_unix_s))),
        ("finished", of(&|scrub| scrub.finished_unix_s.map(rfc3339).unwrap_or_default())),
        ("checksum errors", store.checksum_errors.to_string()),
        ("lost blocks", store.lost_blocks.to_string()),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scrub(state: &str, errors: u64) -> t::Scrub {
        t::Scrub {
            run: 3,
            state: state.into(),
            rate_bytes_per_s: 64 << 20,
            done_bytes: 1 << 30,
            total_bytes: 3 << 30,
            errors,
            started_unix_s: 0,
            finished_unix_s: None,
        }
    }

    #[test]
    fn a_scrub_is_said_in_a_few_words() {
        assert_eq!(brief(&scrub("running", 0)), "running 33 %");
        assert_eq!(brief(&scrub("stopped", 2)), "stopped 33 %, 2 damaged");
        assert_eq!(brief(&scrub("finished", 1)), "finished, 1 damaged");
        assert_eq!(brief(&scrub("waiting", 0)), "waiting");
        assert_eq!(percent(&t::Scrub { total_bytes: 0, ..scrub("waiting", 0) }), "-");
        let beyond = t::Scrub { done_bytes: u64::MAX, total_bytes: u64::MAX - 1, ..scrub("running", 0) };
        assert_eq!(percent(&beyond), "100 %");
    }
}
