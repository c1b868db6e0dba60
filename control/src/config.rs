//! Settings of the cluster: one record, which `torusctl config` lists, shows and changes.
//!
//! A setting has a name, a value in one spelling, a default, and a line that says what it is for. What is not set has its default, so
//! that a later version may choose another one.

use serde::{Deserialize, Serialize};

use crate::meta::{Compare, Txn};
use crate::model::{View, encode, keys};
use crate::ops::{Plan, Refusal, RefusalKind};
use crate::size::{self, human};

/// What is set.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConfigRecord {
    /// See [`Setting::ResyncRate`]; 0: no limit.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub resync_rate: Option<u64>,
}

/// A setting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Setting {
    /// Most bytes that a node's heads compare and copy in a second to bring members up to date.
    ResyncRate,
}

impl Setting {
    /// All of them, by name.
    pub const ALL: [Self; 1] = [Self::ResyncRate];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::ResyncRate => "resync-rate",
        }
    }

    /// What it is for.
    #[must_use]
    pub fn description(self) -> &'static str {
        match self {
            Self::ResyncRate => {
                "most that a node compares and copies in a second to bring copies up to date, for all volumes that it is head of; \
                 a size, or none for no limit"
            }
        }
    }

    /// Its default. Copies that are behind are in danger, so that they are brought up to date as fast as can be where nobody says
    /// otherwise.
    #[must_use]
    pub fn default_value(self) -> u64 {
        match self {
            Self::ResyncRate => 0,
        }
    }

    /// The setting of a name.
    ///
    /// # Errors
    /// There is none.
    pub fn named(name: &str) -> Result<Self, Refusal> {
        Self::ALL.into_iter().find(|setting| setting.name() == name).ok_or_else(|| {
            let message = format!("there is no setting {name}");
            Refusal::new(RefusalKind::NotFound, "no_such_setting", message, "see `torusctl config list`")
        })
    }

    fn slot(self, record: &mut ConfigRecord) -> &mut Option<u64> {
        match self {
            Self::ResyncRate => &mut record.resync_rate,
        }
    }

    /// What is set; `None` if nothing is.
    #[must_use]
    pub fn set_value(self, view: &View) -> Option<u64> {
        let record = &view.config.as_ref()?.record;
        match self {
            Self::ResyncRate => record.resync_rate,
        }
    }

    /// What is in force.
    #[must_use]
    pub fn value(self, view: &View) -> u64 {
        self.set_value(view).unwrap_or_else(|| self.default_value())
    }

    /// A value as people write it.
    #[must_use]
    pub fn words(self, value: u64) -> String {
        match self {
            Self::ResyncRate if value == 0 => "none".into(),
            Self::ResyncRate => human(value),
        }
    }

    /// Reads a value as people write it; `None` for `default`.
    ///
    /// # Errors
    /// It is none.
    pub fn parse(self, text: &str) -> Result<Option<u64>, Refusal> {
        match (self, text) {
            (_, "default") => Ok(None),
            (Self::ResyncRate, "none" | "unlimited") => Ok(Some(0)),
            (Self::ResyncRate, _) => size::parse(text).map(Some).map_err(|error| {
                let message = format!("\"{text}\" is no value of {}: {error}", self.name());
                let hint = "write bytes per second such as 200MiB, or none, or default";
                Refusal::new(RefusalKind::Invalid, "bad_value", message, hint)
            }),
        }
    }
}

/// Sets a setting; `None` takes it back.
///
/// # Errors
/// The cluster is not initialised.
pub fn set(view: &View, setting: Setting, value: Option<u64>) -> Result<Plan<()>, Refusal> {
    view.initialised()?;
    if setting.set_value(view) == value {
        return Ok(Plan::Done(()));
    }
    let mut record = view.config.as_ref().map(|known| known.record.clone()).unwrap_or_default();
    *setting.slot(&mut record) = value;
    let guard = match &view.config {
        Some(known) => Compare::Revision(keys::CONFIG.into(), known.revision),
        None => Compare::Absent(keys::CONFIG.into()),
    };
    Ok(Plan::Commit(Txn::new().when(guard).put(keys::CONFIG, encode(&record)), ()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_read_as_they_are_written() {
        let rate = Setting::named("resync-rate").unwrap();
        for (text, value, words) in [
            ("200MiB", 200 << 20, "200 MiB"),
            ("none", 0, "none"),
            ("0", 0, "none"),
            ("1.5GiB", 3 << 29, "1.5 GiB"),
        ] {
            assert_eq!(rate.parse(text).unwrap(), Some(value), "{text}");
            assert_eq!(rate.words(value).replace(' ', ""), words.replace(' ', ""), "{text}");
        }
        assert_eq!(rate.parse("default").unwrap(), None);
        for bad in ["", "fast", "-1", "200MiB/s"] {
            assert_eq!(rate.parse(bad).unwrap_err().code, "bad_value", "{bad}");
        }
        assert_eq!(Setting::named("speed").unwrap_err().code, "no_such_setting");
    }
}
