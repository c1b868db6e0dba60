//! What initiators see of an export besides its blocks, and what they may change: interfaces, config string, mask list,
//! reservation, and the policy that says who may change the latter three over AoE.
//!
//! Pure: [`ExportSettings::changed`] decides a change that an initiator asked for. All of it stands in the export's record
//! ([`crate::model::ExportRecord`]), so that every change of it, over the API or over AoE, is one compare-and-swap.

use std::fmt::{self, Write as _};
use std::str::FromStr;

use cluster_map::{
    Allow, AoePolicy, Change, ChangeOutcome, MAX_CONFIG_STRING_BYTES, MAX_INTERFACES, MAX_LISTED_MACS,
    MaskEdit, NodeId, SetRule,
};
use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::model::{Mac, ModelError, text};

/// Highest VLAN id; 0 and 4095 are reserved.
const MAX_VLAN: u16 = 4094;
/// Longest name of a network device in Linux, in bytes.
const MAX_NETDEV_BYTES: usize = 15;

/// What is wrong with a setting.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum SettingError {
    /// Too long for a frame.
    #[error("a config string of {0} bytes is too long: at most {MAX_CONFIG_STRING_BYTES} are possible")]
    StringTooLong(usize),
    /// A backslash that begins nothing.
    #[error("\"{0}\" has a lone backslash: write \\\\ for a backslash and \\xHH for a byte, such as \\x00")]
    Escape(String),
    /// Not hexadecimal.
    #[error("\"{0}\" is not hexadecimal: write two digits for each byte, such as 68656c6c6f")]
    Hex(String),
    /// Too many MACs for a frame.
    #[error("{0} MAC addresses are too many: at most {MAX_LISTED_MACS} are possible")]
    TooManyMacs(usize),
    /// No initiator sends from it: a group address, or none.
    #[error(
        "{0} is a group address or all zeros, from which no initiator sends: name the MAC of the initiator's interface"
    )]
    NoStation(Mac),
    /// Not a MAC.
    #[error("{0}; write six bytes such as 02:00:5e:10:00:01")]
    Mac(#[from] ModelError),
    /// Not an interface.
    #[error(
        "\"{0}\" is not an interface: write the name of a network device, such as eth0, or one with a VLAN id from 1 to {MAX_VLAN}, such as eth0@100"
    )]
    Interface(String),
    /// Named twice.
    #[error("interface {0} is named twice; name each once")]
    InterfaceTwice(String),
    /// The export's MAC has no room for more.
    #[error("{0} interfaces are too many: at most {MAX_INTERFACES} are possible")]
    TooManyInterfaces(usize),
}

/// A network device, or one VLAN of it: `eth0`, `eth0@100`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LogicalInterface {
    /// Name of the network device.
    pub netdev: String,
    /// VLAN id, 1 to 4094; `None`: the frames without a tag.
    pub vlan: Option<u16>,
}

impl fmt::Display for LogicalInterface {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.netdev)?;
        self.vlan.map_or(Ok(()), |vlan| write!(f, "@{vlan}"))
    }
}

impl FromStr for LogicalInterface {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let wrong = || SettingError::Interface(text.escape_debug().to_string());
        let (netdev, vlan) = match text.split_once('@') {
            None => (text, None),
            Some((netdev, id)) => {
                let plain = (1..=4).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_digit());
                let id = id.parse().ok().filter(|id| plain && (1..=MAX_VLAN).contains(id));
                (netdev, Some(id.ok_or_else(wrong)?))
            }
        };
        // The kernel's rule, dev_valid_name, and no comma: lists of interfaces are separated by it.
        let fine = (1..=MAX_NETDEV_BYTES).contains(&netdev.len())
            && !matches!(netdev, "." | "..")
            && !netdev
                .contains(|c: char| c.is_whitespace() || c.is_control() || matches!(c, '/' | ':' | ','));
        if fine { Ok(Self { netdev: netdev.to_owned(), vlan }) } else { Err(wrong()) }
    }
}

/// Reads a list of logical interfaces: each well formed, none twice, no more than an export has MACs for. Each comes back
/// in its one spelling.
///
/// # Errors
/// [`SettingError`].
pub fn parse_interfaces(names: &[String]) -> Result<Vec<LogicalInterface>, SettingError> {
    let mut all: Vec<LogicalInterface> = Vec::new();
    for name in names {
        let interface = name.parse()?;
        if all.contains(&interface) {
            return Err(SettingError::InterfaceTwice(interface.to_string()));
        }
        all.push(interface);
    }
    if all.len() > MAX_INTERFACES { Err(SettingError::TooManyInterfaces(all.len())) } else { Ok(all) }
}

fn hex_digit(byte: u8) -> Option<u8> {
    char::from(byte).to_digit(16).and_then(|digit| u8::try_from(digit).ok())
}

/// The bytes of a config string. As text: printable ASCII as it is, a backslash doubled, every other byte as `\xHH`.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct ConfigString(Vec<u8>);

impl ConfigString {
    /// Any bytes, if they are few enough.
    ///
    /// # Errors
    /// [`SettingError::StringTooLong`].
    pub fn new(bytes: Vec<u8>) -> Result<Self, SettingError> {
        if bytes.len() > MAX_CONFIG_STRING_BYTES {
            return Err(SettingError::StringTooLong(bytes.len()));
        }
        Ok(Self(bytes))
    }

    /// Reads two hexadecimal digits for each byte.
    ///
    /// # Errors
    /// [`SettingError::Hex`] or [`SettingError::StringTooLong`].
    pub fn from_hex(text: &str) -> Result<Self, SettingError> {
        let wrong = || SettingError::Hex(text.escape_debug().to_string());
        let (pairs, []) = text.as_bytes().as_chunks::<2>() else { return Err(wrong()) };
        let byte = |[high, low]: &[u8; 2]| Some(hex_digit(*high)? << 4 | hex_digit(*low)?);
        Self::new(pairs.iter().map(byte).collect::<Option<_>>().ok_or_else(wrong)?)
    }

    /// The bytes.
    #[must_use]
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Display for ConfigString {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| match byte {
            b'\\' => f.write_str("\\\\"),
            b' '..=b'~' => f.write_char(char::from(*byte)),
            other => write!(f, "\\x{other:02x}"),
        })
    }
}

impl FromStr for ConfigString {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        let wrong = || SettingError::Escape(text.escape_debug().to_string());
        let mut bytes = Vec::new();
        let mut rest = text.as_bytes();
        while let [first, tail @ ..] = rest {
            let (byte, after) = match (first, tail) {
                (b'\\', [b'\\', after @ ..]) => (b'\\', after),
                (b'\\', [b'x', high, low, after @ ..]) => {
                    let digits = hex_digit(*high).zip(hex_digit(*low));
                    (digits.map(|(high, low)| high << 4 | low).ok_or_else(wrong)?, after)
                }
                (b'\\', _) => return Err(wrong()),
                (plain, after) => (*plain, after),
            };
            bytes.push(byte);
            rest = after;
        }
        Self::new(bytes)
    }
}

/// Checks a list of MACs that an administrator gave, and takes out what is named twice; the order stays.
///
/// # Errors
/// [`SettingError`].
pub fn listed_macs(macs: impl IntoIterator<Item = Mac>) -> Result<Vec<Mac>, SettingError> {
    let mut all = Vec::new();
    for mac in macs {
        if mac.0[0] & 1 == 1 || mac.0 == [0; 6] {
            return Err(SettingError::NoStation(mac));
        }
        if !all.contains(&mac) {
            all.push(mac);
        }
    }
    if all.len() > MAX_LISTED_MACS { Err(SettingError::TooManyMacs(all.len())) } else { Ok(all) }
}

/// Who may change a setting over AoE. As text: `none`, `any`, or MACs with commas between.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub enum Who {
    /// Only the cluster's API.
    #[default]
    Nobody,
    /// Every initiator.
    Anyone,
    /// The initiators with these MACs.
    Only(Vec<Mac>),
}

impl Who {
    /// As the data plane is told.
    #[must_use]
    pub fn allow(&self) -> Allow {
        match self {
            Self::Nobody => Allow::Nobody,
            Self::Anyone => Allow::Anyone,
            Self::Only(macs) => Allow::Only(bare(macs)),
        }
    }
}

impl fmt::Display for Who {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nobody => f.write_str("none"),
            Self::Anyone => f.write_str("any"),
            Self::Only(macs) => macs
                .iter()
                .enumerate()
                .try_for_each(|(index, mac)| write!(f, "{}{mac}", if index > 0 { "," } else { "" })),
        }
    }
}

impl FromStr for Who {
    type Err = SettingError;

    fn from_str(text: &str) -> Result<Self, SettingError> {
        match text {
            "none" => Ok(Self::Nobody),
            "any" => Ok(Self::Anyone),
            macs => {
                let macs = macs.split(',').map(str::parse).collect::<Result<Vec<Mac>, ModelError>>()?;
                Ok(Self::Only(listed_macs(macs)?))
            }
        }
    }
}

/// Who may change what of an export over AoE.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Policy {
    /// The config string.
    #[serde(with = "text", skip_serializing_if = "is_default")]
    pub config: Who,
    /// The mask list.
    #[serde(with = "text", skip_serializing_if = "is_default")]
    pub masks: Who,
    /// The reservation.
    #[serde(with = "text", skip_serializing_if = "is_default")]
    pub reserve: Who,
}

impl Policy {
    /// As the data plane is told.
    #[must_use]
    pub fn allow(&self) -> AoePolicy {
        AoePolicy { config: self.config.allow(), masks: self.masks.allow(), reserve: self.reserve.allow() }
    }
}

/// A change that an initiator asked for, named by who took it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChangeId {
    /// The node whose data plane was asked.
    #[serde(with = "text")]
    pub node: NodeId,
    /// The id that it gave.
    pub id: u64,
}

/// What an export's record says besides volume and address; what is not in a record has its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct ExportSettings {
    /// Logical interfaces that it is served on; empty: all of its node.
    #[serde(skip_serializing_if = "is_default")]
    pub interfaces: Vec<String>,
    /// The config string.
    #[serde(with = "text", skip_serializing_if = "is_default")]
    pub config_string: ConfigString,
    /// The MACs that are answered; empty: all.
    #[serde(with = "mac_list", skip_serializing_if = "is_default")]
    pub masks: Vec<Mac>,
    /// The MACs that it is reserved for; empty: not reserved.
    #[serde(with = "mac_list", skip_serializing_if = "is_default")]
    pub reserved_for: Vec<Mac>,
    /// Who may change these over AoE.
    #[serde(skip_serializing_if = "is_default")]
    pub policy: Policy,
    /// The last change over AoE that was carried out: a torusd that starts anew does not do it again.
    #[serde(skip_serializing_if = "is_default")]
    pub last_change: Option<ChangeId>,
}

fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// The bytes of MACs.
#[must_use]
pub fn bare(macs: &[Mac]) -> Vec<[u8; 6]> {
    macs.iter().map(|mac| mac.0).collect()
}

/// Serde adapter for lists of MACs as text.
mod mac_list {
    use super::Mac;
    use serde::{Deserialize, Deserializer, Serializer, de::Error};

    pub(super) fn serialize<S: Serializer>(macs: &[Mac], s: S) -> Result<S::Ok, S::Error> {
        s.collect_seq(macs.iter().map(ToString::to_string))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(d: D) -> Result<Vec<Mac>, D::Error> {
        let texts = Vec::<String>::deserialize(d)?;
        texts.iter().map(|text| text.parse().map_err(D::Error::custom)).collect()
    }
}

impl ExportSettings {
    /// Whether nothing was ever set.
    #[must_use]
    pub fn is_default(&self) -> bool {
        is_default(self)
    }

    /// Decides what an initiator asked for: the settings after it, or why nothing changes. The list of masks is as it was
    /// unless every edit can be made.
    ///
    /// # Errors
    /// Any outcome but [`ChangeOutcome::Done`].
    pub fn changed(&self, client: Mac, change: &Change) -> Result<Self, ChangeOutcome> {
        let who = match change {
            Change::SetString { .. } => &self.policy.config,
            Change::EditMasks { .. } => &self.policy.masks,
            Change::Reserve { .. } => &self.policy.reserve,
        };
        // The policy may have changed since the data plane looked.
        if !who.allow().includes(client.0) {
            return Err(ChangeOutcome::Refused);
        }
        let mut next = self.clone();
        match change {
            Change::SetString { rule, string } => {
                let present = self.config_string.bytes();
                let free = match rule {
                    SetRule::IfEmpty => present.is_empty() || present == string,
                    SetRule::Always => true,
                    SetRule::Replace { expected } => present == expected,
                };
                if !free {
                    return Err(ChangeOutcome::StringPresent);
                }
                let string = ConfigString::new(string.clone());
                next.config_string = string.map_err(|_| ChangeOutcome::Refused)?;
            }
            Change::EditMasks { edits } => edits.iter().try_for_each(|edit| next.edit_masks(*edit))?,
            Change::Reserve { macs, force } => {
                let holder = self.reserved_for.is_empty() || self.reserved_for.contains(&client);
                if !holder && !force {
                    return Err(ChangeOutcome::Reserved);
                }
                if macs.len() > MAX_LISTED_MACS {
                    return Err(ChangeOutcome::Refused);
                }
                next.reserved_for = macs.iter().copied().map(Mac).collect();
            }
        }
        Ok(next)
    }

    fn edit_masks(&mut self, edit: MaskEdit) -> Result<(), ChangeOutcome> {
        let mac = Mac(edit.mac);
        match (edit.add, self.masks.contains(&mac)) {
            (true, false) if self.masks.len() >= MAX_LISTED_MACS => {
                return Err(ChangeOutcome::MasksFull { position: edit.position });
            }
            (true, false) => self.masks.push(mac),
            (false, true) => self.masks.retain(|masked| *masked != mac),
            (true, true) | (false, false) => {}
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ONE: Mac = Mac([2, 0, 0, 0, 0, 1]);
    const TWO: Mac = Mac([2, 0, 0, 0, 0, 2]);

    fn open() -> ExportSettings {
        let policy = Policy { config: Who::Anyone, masks: Who::Anyone, reserve: Who::Anyone };
        ExportSettings { policy, ..ExportSettings::default() }
    }

    fn set(rule: SetRule, string: &[u8]) -> Change {
        Change::SetString { rule, string: string.to_vec() }
    }

    fn edits(list: &[(bool, Mac)]) -> Change {
        let edit = |(position, (add, mac)): (u8, &(bool, Mac))| MaskEdit { position, add: *add, mac: mac.0 };
        Change::EditMasks { edits: (0..).zip(list).map(edit).collect() }
    }

    #[test]
    fn interfaces_are_names_with_or_without_a_vlan() {
        let vlan = |id| LogicalInterface { netdev: "eth0".into(), vlan: id };
        assert_eq!("eth0".parse(), Ok(vlan(None)));
        assert_eq!("eth0@1".parse(), Ok(vlan(Some(1))));
        assert_eq!("eth0@4094".parse(), Ok(vlan(Some(4094))));
        for text in ["eth0", "eth0@100", "enp0s31f6np0@7", "tücke"] {
            assert_eq!(text.parse::<LogicalInterface>().unwrap().to_string(), text);
        }
        for bad in [
            "",
            "@1",
            "eth0@",
            "eth0@0",
            "eth0@4095",
            "eth0@99999",
            "eth0@+1",
            "eth0@1@2",
            "a b",
            "a/b",
            "a:1",
            ".",
            "..",
            "sixteen-bytes-xx",
            "a\n",
        ] {
            let error = bad.parse::<LogicalInterface>().unwrap_err().to_string();
            assert!(error.contains("eth0@100"), "{bad:?}: {error}");
        }
        let names =
            |list: &[&str]| parse_interfaces(&list.iter().map(|n| (*n).to_owned()).collect::<Vec<_>>());
        assert_eq!(names(&["eth0", "eth0@100"]).unwrap().len(), 2);
        assert_eq!(
            names(&["eth0@7", "eth0@007"]).unwrap_err(),
            SettingError::InterfaceTwice("eth0@7".into())
        );
        let many: Vec<String> = (0..17).map(|n| format!("eth{n}")).collect();
        assert_eq!(parse_interfaces(&many), Err(SettingError::TooManyInterfaces(17)));
    }

    #[test]
    fn config_strings_are_readable_where_they_can_be() {
        let text = |bytes: &[u8]| ConfigString::new(bytes.to_vec()).unwrap().to_string();
        assert_eq!(text(b"rack 7"), "rack 7");
        assert_eq!(text(b"a\\b\0\xff\n"), r"a\\b\x00\xff\x0a");
        assert_eq!("ü".parse::<ConfigString>().unwrap().bytes(), "ü".as_bytes());
        assert_eq!(ConfigString::from_hex("00fF").unwrap().bytes(), b"\0\xff");
        for bad in ["\\", "a\\n", "\\x1", "\\xgg", "\\x+1"] {
            assert!(matches!(bad.parse::<ConfigString>(), Err(SettingError::Escape(_))), "{bad}");
        }
        for bad in ["0", "zz", "+1", "0x00"] {
            assert!(matches!(ConfigString::from_hex(bad), Err(SettingError::Hex(_))), "{bad}");
        }
        assert!(ConfigString::new(vec![0; 1024]).is_ok());
        assert_eq!("x".repeat(1025).parse::<ConfigString>(), Err(SettingError::StringTooLong(1025)));
    }

    #[test]
    fn who_is_nobody_anyone_or_a_list() {
        for (text, who) in [
            ("none", Who::Nobody),
            ("any", Who::Anyone),
            ("02:00:00:00:00:01,02:00:00:00:00:02", Who::Only(vec![ONE, TWO])),
        ] {
            assert_eq!((text.parse(), who.to_string().as_str()), (Ok(who.clone()), text));
        }
        for bad in ["", "all", "02:00:00:00:00:01,", "01:00:00:00:00:01"] {
            assert!(bad.parse::<Who>().is_err(), "{bad}");
        }
        assert_eq!(listed_macs([ONE, TWO, ONE]).unwrap(), [ONE, TWO]);
        let many = (0..65u8).map(|n| Mac([2, 0, 0, 0, 0, n]));
        assert_eq!(listed_macs(many), Err(SettingError::TooManyMacs(65)));
    }

    #[test]
    fn defaults_take_no_room_in_a_record_and_old_records_are_read() {
        assert_eq!(serde_json::to_string(&ExportSettings::default()).unwrap(), "{}");
        assert_eq!(serde_json::from_str::<ExportSettings>("{}").unwrap(), ExportSettings::default());
        let full = ExportSettings {
            interfaces: vec!["eth0@5".into()],
            config_string: ConfigString::new(vec![0, b'a', b'\\', 255]).unwrap(),
            masks: vec![ONE],
            reserved_for: vec![TWO],
            policy: Policy { config: Who::Anyone, masks: Who::Only(vec![ONE, TWO]), reserve: Who::Nobody },
            last_change: Some(ChangeId { node: NodeId([7; 16]), id: u64::MAX }),
        };
        let text = serde_json::to_string(&full).unwrap();
        assert_eq!(serde_json::from_str::<ExportSettings>(&text).unwrap(), full, "{text}");
    }

    #[test]
    fn strings_are_set_by_their_rule() {
        let empty = open();
        let set_to = |from: &ExportSettings, rule, string: &[u8]| from.changed(ONE, &set(rule, string));
        let a = set_to(&empty, SetRule::IfEmpty, b"a").unwrap();
        assert_eq!(a.config_string.bytes(), b"a");
        assert_eq!(set_to(&a, SetRule::IfEmpty, b"a").unwrap(), a, "the same is there already");
        assert_eq!(set_to(&a, SetRule::IfEmpty, b"b"), Err(ChangeOutcome::StringPresent));
        assert_eq!(set_to(&a, SetRule::Always, b"").unwrap(), empty);
        let replace = |expected: &[u8]| SetRule::Replace { expected: expected.to_vec() };
        assert_eq!(set_to(&a, replace(b"a"), b"c").unwrap().config_string.bytes(), b"c");
        assert_eq!(set_to(&a, replace(b"x"), b"c"), Err(ChangeOutcome::StringPresent));
        assert_eq!(set_to(&a, SetRule::Always, &[0; 1025]), Err(ChangeOutcome::Refused));
    }

    #[test]
    fn masks_are_edited_in_order_and_wholly_or_not_at_all() {
        let one = open().changed(TWO, &edits(&[(true, ONE), (true, ONE), (false, TWO)])).unwrap();
        assert_eq!(one.masks, [ONE]);
        assert_eq!(one.changed(ONE, &edits(&[(false, ONE), (true, TWO)])).unwrap().masks, [TWO]);
        let full = ExportSettings { masks: (0..64u8).map(|n| Mac([4, 0, 0, 0, 0, n])).collect(), ..open() };
        let first = full.masks[0];
        assert_eq!(
            full.changed(ONE, &edits(&[(false, first), (true, ONE), (true, first), (true, TWO)])),
            Err(ChangeOutcome::MasksFull { position: 2 })
        );
        assert!(full.changed(ONE, &edits(&[(true, first), (false, first), (true, ONE)])).is_ok());
    }

    #[test]
    fn a_reservation_is_changed_by_its_holder_or_by_force() {
        let reserve = |macs: &[Mac], force| Change::Reserve { macs: bare(macs), force };
        let held = open().changed(ONE, &reserve(&[ONE], false)).unwrap();
        assert_eq!(held.reserved_for, [ONE]);
        assert_eq!(held.changed(TWO, &reserve(&[TWO], false)), Err(ChangeOutcome::Reserved));
        assert_eq!(held.changed(TWO, &reserve(&[], false)), Err(ChangeOutcome::Reserved));
        assert_eq!(held.changed(TWO, &reserve(&[TWO], true)).unwrap().reserved_for, [TWO]);
        assert_eq!(held.changed(ONE, &reserve(&[], false)).unwrap(), open());
        let many: Vec<Mac> = (0..65u8).map(|n| Mac([2, 0, 0, 0, 0, n])).collect();
        assert_eq!(open().changed(ONE, &reserve(&many, false)), Err(ChangeOutcome::Refused));
        assert!(open().changed(ONE, &reserve(&many[..64], false)).is_ok());
    }

    #[test]
    fn the_policy_decides_who_may() {
        let only_two = Who::Only(vec![TWO]);
        let changes = [
            set(SetRule::Always, b"x"),
            edits(&[(true, ONE)]),
            Change::Reserve { macs: vec![ONE.0], force: true },
        ];
        for (index, change) in changes.iter().enumerate() {
            let mut who = [Who::Anyone, Who::Anyone, Who::Anyone];
            who[index] = only_two.clone();
            let [config, masks, reserve] = who;
            let policy = Policy { config, masks, reserve };
            let settings = ExportSettings { policy, ..ExportSettings::default() };
            assert_eq!(settings.changed(ONE, change), Err(ChangeOutcome::Refused));
            assert!(settings.changed(TWO, change).is_ok());
            assert_eq!(ExportSettings::default().changed(TWO, change), Err(ChangeOutcome::Refused));
        }
    }

    proptest! {
        #[test]
        fn config_strings_round_trip(bytes in proptest::collection::vec(any::<u8>(), 0..60)) {
            let string = ConfigString::new(bytes.clone()).unwrap();
            prop_assert_eq!(string.to_string().parse::<ConfigString>().unwrap(), string.clone());
            prop_assert!(string.to_string().bytes().all(|byte| (b' '..=b'~').contains(&byte)));
            let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
            prop_assert_eq!(ConfigString::from_hex(&hex).unwrap(), string);
        }
    }
}
