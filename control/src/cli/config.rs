//! `torusctl config`: settings of the cluster.

use clap::Subcommand;
use hyper::Method;

use super::{Done, fields, print, print_json, staleness, table};
use crate::api::types as t;
use crate::client::{Client, segment};

/// What is done with settings.
#[derive(Debug, Subcommand)]
pub(super) enum ConfigCommand {
    /// List the settings
    #[command(after_help = "Examples:\n  torusctl config list\n  torusctl config list --json")]
    List,
    /// Show a setting
    #[command(
        after_help = "Examples:\n  torusctl config get resync-rate\n  torusctl config get resync-rate --json"
    )]
    Get {
        /// Its name
        name: String,
    },
    /// Change a setting, for all nodes at once
    #[command(
        after_help = "Examples:\n  torusctl config set resync-rate 200MiB\n  torusctl config set resync-rate none\n  torusctl config set resync-rate default"
    )]
    Set {
        /// Its name
        name: String,
        /// The value; `default` takes it back
        value: String,
    },
}

pub(super) async fn run(client: &Client, json: bool, command: ConfigCommand) -> Done {
    match command {
        ConfigCommand::List => {
            let list: t::SettingList = client.get("/v1/config").await?;
            if json {
                return print_json(&list);
            }
            staleness(&list.metadata);
            let row = |s: t::Setting| vec![s.name, s.words, s.default, s.description];
            let rows = list.settings.into_iter().map(row).collect();
            print(&table(&["setting", "value", "default", "what it is"], &[], rows))
        }
        ConfigCommand::Get { name } => {
            let answer: t::SettingAnswer = client.get(&format!("/v1/config/{}", segment(&name))).await?;
            if json {
                return print_json(&answer);
            }
            staleness(&answer.metadata);
            let setting = answer.setting;
            print(&fields(&[
                ("setting", setting.name),
                ("value", setting.words),
                ("default", setting.default),
                ("what it is", setting.description),
            ]))
        }
        ConfigCommand::Set { name, value } => {
            let path = format!("/v1/config/{}", segment(&name));
            let request = t::SettingRequest { value };
            let answer: t::SettingAnswer = client.request(Method::PUT, &path, Some(&request)).await?;
            if json {
                return print_json(&answer);
            }
            let setting = answer.setting;
            let default = if setting.is_set { "" } else { " (the default)" };
            print(&format!("{} is {}{default}\n", setting.name, setting.words))
        }
    }
}
