//! The target's state machine alone: frames go in, answers come out, the disk is a table in memory and changes are stored
//! at once.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use aoe_xdp::target::{
    self, Action, Allow, Answer, AoePolicy, BODY_LEN_MAX, Change, ChangeOutcome, Export, ExportTable,
    Ingress, Io, IoKind, LIST_MAX, ON_ALL_INTERFACES, Outcome, Route, SetRule, advertisement,
};
use aoe_xdp::wire::{Address, Mac as WireMac};

use crate::frames::Mac;
use crate::world::{Carrier, EXPORTS, SECTORS_MAX, World};

const INGRESS: Ingress = Ingress {
    mac: WireMac([2, 0, 0, 0, 0, 1]),
    ordinal: 0,
    sectors_max: SECTORS_MAX,
    sectors_told: SECTORS_MAX,
};

/// A target without I/O.
#[derive(Debug)]
pub struct Model {
    exports: Vec<Export>,
    table: ExportTable,
    /// By export key and sector.
    disk: BTreeMap<(u32, u64), Vec<u8>>,
    out: VecDeque<Vec<u8>>,
    worlds: u32,
    /// What the disk answers to reads and writes.
    pub disk_fails: Option<Outcome>,
}

/// Runs a case.
pub fn run(case: impl FnOnce(&mut World<'_>)) {
    case(&mut World::new(&mut Model::new()));
}

impl Model {
    /// The world's exports, all sectors zero.
    #[must_use]
    pub fn new() -> Model {
        let allow = |open| if open { Allow::Anyone } else { Allow::Nobody };
        let exports = (0u32..).zip(EXPORTS).map(|(key, plan)| Export {
            key,
            address: Address { shelf: plan.shelf, slot: plan.slot },
            mac: WireMac([2, 0xaa, 0, 0, u8::try_from(key).unwrap(), 0x10]),
            size_sectors: plan.sectors,
            read_only: plan.read_only,
            serial: "0123456789".into(),
            config_string: Vec::new(),
            on_interfaces: ON_ALL_INTERFACES,
            masks: Vec::new(),
            reserved_for: Vec::new(),
            allow: AoePolicy { config: allow(plan.open), masks: allow(plan.open), reserve: allow(plan.open) },
        });
        let mut model = Model {
            exports: exports.collect(),
            table: ExportTable::default(),
            disk: BTreeMap::new(),
            out: VecDeque::new(),
            worlds: 0,
            disk_fails: None,
        };
        model.changed();
        model
    }

    /// Puts the exports in force and advertises them.
    fn changed(&mut self) {
        self.table = ExportTable::new(self.exports.clone()).unwrap();
        for export in &self.exports {
            for to in export.audience() {
                let answer = advertisement(export, &INGRESS, *to);
                self.out.push_back(whole(export, &answer, &[]));
            }
        }
    }

    /// Gives an export another size.
    pub fn resize(&mut self, export: usize, sectors: u64) {
        self.exports[export].size_sectors = sectors;
        self.changed();
    }

    fn serve(&mut self, key: usize, frame: &[u8]) {
        let export = &self.exports[key];
        match target::respond(export, &INGRESS, frame, frame.len()) {
            Action::Silent(_) => {}
            Action::Answer(answer) => self.out.push_back(whole(export, &answer, frame)),
            Action::Io(io) => self.disk_io(export.key, io, frame),
            Action::Change { frame_len } => {
                let frame = &frame[..frame_len];
                let change = target::change_in(frame).expect("it was called a change");
                let outcome = store(&mut self.exports[key], change);
                self.changed();
                if let Some(answer) = target::finish_change(&self.exports[key], &INGRESS, frame, outcome) {
                    self.out.push_back(whole(&self.exports[key], &answer, frame));
                }
            }
        }
    }

    fn disk_io(&mut self, key: u32, io: Io, frame: &[u8]) {
        let outcome = self.disk_fails.unwrap_or(Outcome::Done);
        let head = io.finish(outcome);
        let mut answer = head.bytes[..usize::from(head.len)].to_vec();
        let sectors = io.lba..io.lba + u64::from(io.sectors);
        if outcome == Outcome::Done {
            match io.kind {
                IoKind::Read => {
                    for sector in sectors {
                        match self.disk.get(&(key, sector)) {
                            Some(data) => answer.extend(data),
                            None => answer.extend([0; 512]),
                        }
                    }
                }
                IoKind::Write => {
                    for (sector, data) in sectors.zip(frame[36..].chunks_exact(512)) {
                        self.disk.insert((key, sector), data.to_vec());
                    }
                }
                IoKind::Flush => {}
            }
        }
        self.out.push_back(answer);
    }
}

impl Default for Model {
    fn default() -> Model {
        Model::new()
    }
}

fn whole(export: &Export, answer: &Answer, request: &[u8]) -> Vec<u8> {
    let mut body = [0; BODY_LEN_MAX];
    let len = answer.write_body(export, request, &mut body);
    [&answer.head.bytes[..usize::from(answer.head.len)], &body[..len]].concat()
}

/// What the control process does, in the simplest way.
fn store(export: &mut Export, change: Change) -> ChangeOutcome {
    match change {
        Change::SetString { rule, string } => {
            let may = match rule {
                SetRule::IfEmpty => export.config_string.is_empty(),
                SetRule::Always => true,
                SetRule::Replace { expected } => export.config_string == expected,
            };
            if !may {
                return ChangeOutcome::StringPresent;
            }
            export.config_string = string;
        }
        Change::EditMasks { edits } => {
            let mut masks = export.masks.clone();
            for edit in edits {
                let found = masks.iter().position(|mac| *mac == edit.mac);
                match (edit.add, found) {
                    (true, None) if masks.len() == LIST_MAX => {
                        return ChangeOutcome::MasksFull { position: edit.position };
                    }
                    (true, None) => masks.push(edit.mac),
                    (false, Some(at)) => drop(masks.remove(at)),
                    _ => {}
                }
            }
            export.masks = masks;
        }
        Change::Reserve { macs, .. } => export.reserved_for = macs,
    }
    ChangeOutcome::Done
}

impl Carrier for Model {
    fn export_mac(&self, export: usize) -> Mac {
        self.exports[export].mac_on(INGRESS.ordinal).0
    }

    fn interface_mac(&self) -> Mac {
        INGRESS.mac.0
    }

    fn send(&mut self, frame: &[u8]) {
        match target::route(&self.table, &INGRESS, frame) {
            Route::Silent(_) => {}
            Route::One(export) => {
                let key = export.key as usize;
                self.serve(key, frame);
            }
            Route::Matching(address) => {
                let matching = self.table.exports().iter().filter(|export| address.matches(export.address));
                for key in matching.map(|export| export.key as usize).collect::<Vec<_>>() {
                    self.serve(key, frame);
                }
            }
        }
    }

    fn receive(&mut self, _within: Duration) -> Option<Vec<u8>> {
        self.out.pop_front().or_else(|| panic!("nothing more will come"))
    }

    fn fresh_tags(&mut self) -> u32 {
        self.worlds += 1;
        self.worlds << 16
    }

    fn crash(&mut self) {
        // Whatever was answered was stored: the tables are what a restarted target would read.
        self.changed();
    }
}
