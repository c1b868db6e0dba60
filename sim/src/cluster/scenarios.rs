//! Plans. [`Plan::drawn`] is anything at all; the others here bring about what chance alone seldom does.

use super::client::Kind;
use super::disk::StoreForm;
use super::script::Step;
use super::{Plan, Trouble};
use crate::network::{Power, Quality};
use crate::random::Random;

const MS: u64 = 1_000_000;

/// A kind of run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scenario {
    /// Anything.
    Any,
    /// A head is replaced while it still has grants, or believes it has: a replica restarts inside a grant, answers come late, links
    /// break one way, requests go to all nodes.
    Fence,
    /// A member leaves, misses writes, comes back, and is disturbed while it is made equal.
    Return,
    /// Outcomes of changes are unknown, and processes end before they are known.
    Doubt,
    /// Work stands at a device while its connection, its head or its generation goes.
    Stall,
    /// A head ends with writes on some replicas only, again and again.
    Logs,
    /// All lose power, with blocks cut short and blocks rotten.
    Power,
    /// A head is asked to hand over, and does, or cannot, or is disturbed.
    HandOver,
    /// Partitions go to other owners while heads, and those who own them, come and go.
    Move,
    /// Frames of initiators and heads are lost or come twice while heads move.
    Frames,
    /// Nothing is troubled but etcd, the ways to it, and control processes: nobody is replaced, and I/O goes on.
    Calm,
    /// Control processes end, and etcd is away, late or forgetful, while members go and come and heads move.
    Control,
}

impl Scenario {
    /// All of them.
    pub const ALL: [Scenario; 12] = [
        Scenario::Any,
        Scenario::Fence,
        Scenario::Return,
        Scenario::Doubt,
        Scenario::Stall,
        Scenario::Logs,
        Scenario::Power,
        Scenario::HandOver,
        Scenario::Move,
        Scenario::Frames,
        Scenario::Calm,
        Scenario::Control,
    ];

    /// One of its runs.
    #[must_use]
    pub fn plan(self, random: &mut Random) -> Plan {
        match self {
            Scenario::Any => Plan::drawn(random),
            Scenario::Fence => fence(random),
            Scenario::Return => return_of_a_member(random),
            Scenario::Doubt => doubt(random),
            Scenario::Stall => stall(random),
            Scenario::Logs => logs(random),
            Scenario::Power => power(random),
            Scenario::HandOver => hand_over(random),
            Scenario::Move => moves(random),
            Scenario::Frames => frames(random),
            Scenario::Calm => calm(random),
            Scenario::Control => control(random),
        }
    }
}

/// A small cluster where something is always in progress on every block, and nothing breaks but by the script.
fn scripted(random: &mut Random, nodes: usize, copies: usize, script: Vec<Step>) -> Plan {
    let lasts_ns: u64 =
        script.iter().map(|step| if let Step::Wait(wait_ns) = step { *wait_ns } else { 0 }).sum();
    Plan {
        nodes,
        volumes: 1,
        copies,
        spread: 1,
        trouble_ns: super::script::BEGIN_NS + lasts_ns + 100 * MS,
        pause_ns: 1_000 * MS,
        troubles: Vec::new(),
        window: 2 + random.index(7),
        blocks: [4, 8, 64][random.index(3)],
        areas: if random.coin() { 4 } else { 1 },
        network: Quality::good(),
        segments: Quality::good(),
        store: StoreForm::drawn(random, false),
        chunks: 1024,
        initiator: if random.one_in(4) { Kind::Linux(1 + random.index(2)) } else { Kind::Hasty },
        is_flooded: random.coin(),
        linger_ns: if random.one_in(4) { 2_000 * MS } else { 20 * MS },
        is_open_to_all: true,
        is_calm: false,
        script,
    }
}

fn wait(random: &mut Random, from_ms: u64, to_ms: u64) -> Step {
    Step::Wait(random.range(from_ms * MS..to_ms * MS))
}

fn power_off(random: &mut Random) -> Power {
    if random.coin() { Power::Off } else { Power::NoProcess }
}

/// Parts: 0 the old head, which has a copy and does not hear of the new one by the record, 1 the other copy, which both can reach at
/// some time, 2 the new head.
fn fence(random: &mut Random) -> Plan {
    let mut script = vec![Step::TakeOver(1), wait(random, 1_300, 1_800), Step::Cast];
    script.push(Step::NoMetadata(0));
    if random.coin() {
        script.push(Step::OnlyRead(true));
        script.push(wait(random, 50, 300));
    }
    if random.one_in(3) {
        script.push(Step::SlowDisk(0, random.magnitude(100 * MS..3_000 * MS)));
    }
    if random.one_in(3) {
        let by_ns = random.range(100 * MS..800 * MS);
        script.push(if random.coin() { Step::SlowLink(1, 0, by_ns) } else { Step::SlowLink(0, 1, by_ns) });
        script.push(wait(random, 300, 1_000));
    }
    script.push(Step::Part(0, 2));
    // Whether the replica hears of the new head at once, or when the new head has lost patience with the old one.
    let is_late = random.coin();
    if is_late {
        script.push(Step::Part(1, 2));
    }
    script.push(Step::TakeOver(2));
    let of_old_head = |random: &mut Random| match random.index(4) {
        0 => Step::Cut(0, 1),
        1 => Step::Cut(1, 0),
        2 => Step::Part(0, 1),
        _ => Step::Wait(0),
    };
    if random.coin() {
        script.push(of_old_head(random));
    }
    if is_late {
        script.push(wait(random, 900, 1_400));
        script.push(of_old_head(random));
    }
    if random.coin() {
        script.push(Step::Restart(1));
    }
    script.push(Step::Join(1, 2));
    script.push(wait(random, 1_500, 2_500));
    Plan { is_flooded: true, ..scripted(random, 3, 2, script) }
}

/// Parts: 0 the head, 1 the member that goes and comes.
fn return_of_a_member(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..1 + random.index(3) {
        if random.one_in(3) {
            // Writes that only this member has, and that nobody asks for again: its head ends, and the next one calls it stale.
            if random.coin() {
                // The others never heard of them: nothing is in their activity logs.
                script.extend([Step::OnlyRead(true), wait(random, 300, 600), Step::Cut(0, 2)]);
                script.extend([Step::OnlyRead(false), wait(random, 5, 60)]);
            } else {
                script.extend([Step::SlowDisk(0, 500 * MS), Step::SlowDisk(2, 500 * MS)]);
                script.push(wait(random, 10, 60));
            }
            script.extend([Step::Abandon, Step::OnlyRead(true), Step::Part(1, 2), Step::Part(0, 1)]);
            script.extend([Step::Kill(0, Power::NoProcess), Step::SlowDisk(0, 0), Step::SlowDisk(2, 0)]);
            script.extend([Step::Join(0, 2), Step::Boot(0), Step::TakeOver(2), wait(random, 2_500, 3_500)]);
            script.extend([Step::Rest(true), wait(random, 20, 60), Step::Join(1, 2)]);
            script.extend([Step::Join(0, 1), wait(random, 100, 900), Step::OnlyRead(false)]);
            script.extend([Step::Rest(false), Step::Cast]);
            continue;
        }
        script.push(match random.index(3) {
            0 => Step::Kill(1, power_off(random)),
            1 => Step::Part(0, 1),
            // What it is asked reaches it, and nobody learns of it.
            _ => Step::Cut(1, 0),
        });
        if random.coin() {
            // What it has missed when it is called stale is not written again, and leaves the activity logs.
            script.extend([wait(random, 5, 60), Step::Narrow(true)]);
        }
        script.push(wait(random, 1_100, 2_600));
        if random.coin() {
            script.push(Step::Abandon);
        }
        if random.one_in(3) {
            script.extend([Step::TakeOver(2), wait(random, 200, 2_000)]);
        }
        if random.coin() {
            script.push(Step::SlowDisk(1, random.magnitude(MS..200 * MS)));
        }
        if random.one_in(3) {
            script.push(Step::BadDisk(1, random.range(5..40)));
        }
        script.extend([Step::Boot(1), Step::Join(0, 1), wait(random, 20, 1_500)]);
        for _ in 0..random.index(4) {
            script.push(match random.index(6) {
                0 => Step::Reset(0, 1),
                1 => Step::Restart(1),
                2 => Step::Restart(0),
                3 => Step::TakeOver(2),
                4 => Step::SlowDisk(1, random.magnitude(MS..2_000 * MS)),
                _ => Step::BadDisk(1, random.range(0..40)),
            });
            script.push(wait(random, 5, 600));
        }
        script.extend([Step::SlowDisk(1, 0), Step::BadDisk(1, 0), wait(random, 100, 1_500), Step::Cast]);
        script.push(Step::Narrow(false));
    }
    let copies = 2 + random.index(2);
    let plan = scripted(random, 3, copies, script);
    let blocks = [4, 64, 2_000][random.index(3)];
    Plan { blocks, areas: if blocks < 1_000 { plan.areas } else { 1 }, ..plan }
}

/// Parts: 0 the head, 1 the member whose state is in doubt, 2 another.
fn doubt(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    let doubt = |random: &mut Random| match random.index(3) {
        0 => Step::AnswersLost(100),
        1 => Step::MetadataAway(true),
        _ => Step::Late(random.magnitude(50 * MS..4_000 * MS)),
    };
    let is_join = random.coin();
    if is_join {
        script.extend([Step::Kill(1, power_off(random)), wait(random, 1_500, 2_600)]);
        if random.coin() {
            script.push(Step::SlowDisk(1, random.magnitude(MS..20 * MS)));
        }
        script.extend([Step::Boot(1), wait(random, 5, 400), doubt(random), wait(random, 20, 800)]);
        script.extend([Step::Kill(1, power_off(random)), wait(random, 100, 2_500)]);
    } else {
        script.extend([doubt(random), Step::Kill(1, power_off(random)), wait(random, 900, 3_000)]);
    }
    let whole = [Step::AnswersLost(0), Step::MetadataAway(false)];
    match random.index(3) {
        // The head ends with it, and the member may be the next one.
        0 => {
            script.extend([Step::Kill(0, power_off(random)), Step::Boot(1)]);
            script.extend(whole);
            script.extend([wait(random, 500, 2_500), Step::Boot(0)]);
        }
        // Another takes over while the wish is under way.
        1 => {
            script.extend(whole);
            script.extend([Step::TakeOver(2), wait(random, 100, 3_000), Step::Boot(1)]);
        }
        _ => {
            match random.index(3) {
                0 => script.push(Step::Restart(0)),
                1 => script.extend([Step::KillControl(0), Step::Restart(0), Step::Boot(0)]),
                _ => script.extend([Step::Kill(0, Power::Off), Step::Boot(0)]),
            }
            if random.coin() {
                script.push(wait(random, 5, 900));
            }
            script.extend(whole);
            script.extend([wait(random, 100, 2_500), Step::Boot(1)]);
        }
    }
    script.push(wait(random, 500, 2_500));
    let copies = 2 + random.index(2);
    scripted(random, 3, copies, script)
}

/// Parts: 0 the head, 1 the replica whose device stalls, 2 the next head.
fn stall(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..1 + random.index(3) {
        let who = random.index(2);
        script.push(Step::SlowDisk(who, random.range(200 * MS..3_000 * MS)));
        script.push(wait(random, 20, 500));
        for _ in 0..1 + random.index(2) {
            match random.index(6) {
                0 => script.push(Step::TakeOver(2)),
                1 => script.push(Step::TakeOver(1)),
                2 => script.push(Step::Restart(0)),
                3 => script.extend([Step::Kill(0, Power::NoProcess), Step::TakeOver(1)]),
                _ => script.push(Step::Reset(0, 1)),
            }
            script.push(wait(random, 50, 400));
            if random.coin() {
                script.push(Step::SlowDisk(who, 0));
            }
        }
        script.extend([wait(random, 200, 2_500), Step::SlowDisk(0, 0), Step::SlowDisk(1, 0), Step::Boot(0)]);
        script.extend([wait(random, 100, 1_000), Step::Cast]);
    }
    let copies = 2 + random.index(2);
    scripted(random, 3, copies, script)
}

/// Parts: 0 the head, 1 a replica that does not get everything.
fn logs(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..2 + random.index(3) {
        match random.index(4) {
            0 => script.push(Step::Cut(0, 1)),
            1 => script.push(Step::Pause(1)),
            2 => script.push(Step::SlowLink(0, 1, random.range(50 * MS..500 * MS))),
            _ => script.push(Step::SlowDisk(1, random.range(50 * MS..900 * MS))),
        }
        script.push(wait(random, 20, 800));
        if random.coin() {
            script.push(Step::Abandon);
        }
        match random.index(4) {
            0 => script.extend([Step::Kill(0, power_off(random)), wait(random, 5, 1_500), Step::Boot(0)]),
            1 => script.push(Step::TakeOver(2)),
            2 => script.push(Step::TakeOver(1)),
            _ => script.push(Step::Restart(0)),
        }
        script.extend([Step::Resume(1), Step::Join(0, 1), Step::SlowDisk(1, 0)]);
        // Once more, while what the former one left is made equal.
        for _ in 0..random.index(3) {
            script.extend([wait(random, 1, 60), Step::Restart(0)]);
        }
        script.extend([wait(random, 50, 1_500), Step::Cast]);
    }
    let copies = 2 + random.index(2);
    scripted(random, 3, copies, script)
}

fn power(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..3 + random.index(5) {
        script.push(match random.index(4) {
            0 => Step::Restart(random.index(3)),
            1 => Step::TakeOver(random.index(3)),
            _ => Step::PowerCut,
        });
        script.push(wait(random, 5, 1_500));
    }
    let copies = 1 + random.index(3);
    let plan = scripted(random, 3, copies, script);
    let troubles = if random.coin() { vec![Trouble::Rot] } else { Vec::new() };
    Plan { troubles, pause_ns: random.range(50 * MS..500 * MS), ..plan }
}

/// Parts: 0 the head, 1 a copy that both can reach, 2 another copy.
fn hand_over(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..1 + random.index(3) {
        // What is in progress when the wish comes takes some time.
        match random.index(6) {
            0 => script.push(Step::SlowDisk(1, random.magnitude(10 * MS..900 * MS))),
            1 => script.push(Step::SlowDisk(0, random.magnitude(10 * MS..900 * MS))),
            2 => script.push(Step::SlowLink(0, 1, random.magnitude(5 * MS..500 * MS))),
            3 => script.push(Step::SlowLink(1, 0, random.range(5 * MS..700 * MS))),
            _ => {}
        }
        if random.one_in(4) {
            script.extend([Step::Kill(2, power_off(random)), wait(random, 1_100, 2_600), Step::Boot(2)]);
            script.push(wait(random, 5, 600));
        }
        let successor = 1 + random.index(2);
        script.extend([wait(random, 1, 300), Step::HandOver(successor), wait(random, 20, 400)]);
        if random.one_in(3) {
            script.push(Step::Abandon);
        }
        match random.index(10) {
            // The head hands over, goes on because nobody hears of it, and is replaced by somebody that it does not hear of.
            0 | 1 => {
                script.extend([Step::NoMetadata(0), wait(random, 2_000, 2_700), Step::Part(0, 2)]);
                script.extend([Step::TakeOver(2), wait(random, 900, 2_500)]);
                script.extend([Step::MetadataAway(false), Step::Join(0, 2)]);
            }
            2 => script.extend([Step::AnswersLost(100), wait(random, 100, 2_700), Step::AnswersLost(0)]),
            3 => script.push(Step::Stay),
            4 => script.extend([Step::Kill(0, power_off(random)), wait(random, 5, 2_000), Step::Boot(0)]),
            5 => {
                script.extend([Step::Kill(successor, power_off(random)), wait(random, 5, 2_600)]);
                script.push(Step::Boot(successor));
            }
            6 => script.push(Step::Restart(random.index(3))),
            8 => script.extend([Step::Leave(0), wait(random, 5, 3_500), Step::Boot(0)]),
            7 => script.extend([Step::Reset(0, 1), wait(random, 1, 50), Step::TakeOver(random.index(3))]),
            _ => {}
        }
        script.extend([wait(random, 10, 1_500), Step::SlowDisk(0, 0), Step::SlowDisk(1, 0)]);
        script.extend([wait(random, 10, 800), Step::Cast]);
    }
    let copies = 2 + random.index(2);
    let plan = scripted(random, 3, copies, script);
    Plan { is_flooded: true, ..plan }
}

/// Parts: 0 the head, then the other owners of the first partition, then nodes that own nothing of it.
fn moves(random: &mut Random) -> Plan {
    let nodes = 3 + random.index(3);
    let copies = 1 + random.index((nodes - 1).min(3));
    let mut script = Vec::new();
    for _ in 0..1 + random.index(4) {
        for _ in 0..1 + random.index(3) {
            script.push(Step::Move(random.index(nodes)));
            script.push(wait(random, 1, 600));
        }
        let who = random.index(nodes);
        match random.index(12) {
            // It does not hear that an owner has gone.
            0 | 1 => {
                script.extend([Step::NoMetadata(0), wait(random, 500, 3_500), Step::MetadataAway(false)]);
            }
            2 => {
                script.extend([Step::Kill(who, power_off(random)), wait(random, 50, 3_000), Step::Boot(who)]);
            }
            3 => script.push(Step::Restart(who)),
            4 => script.push(Step::TakeOver(who)),
            5 => script.push(Step::HandOver(who)),
            6 => {
                script.extend([Step::Part(0, who), wait(random, 50, 3_000), Step::Join(0, who)]);
            }
            7 => script.push(Step::SlowDisk(who, random.magnitude(10 * MS..1_500 * MS))),
            8 => script.push(Step::BadDisk(who, random.range(5..80))),
            9 => script.extend([Step::AnswersLost(60), wait(random, 100, 2_000), Step::AnswersLost(0)]),
            10 => script.push(Step::PowerCut),
            _ => script.push(Step::Reset(0, who)),
        }
        script.extend([wait(random, 10, 2_500), Step::SlowDisk(who, 0), Step::BadDisk(who, 0)]);
        if random.coin() {
            script.push(Step::Cast);
        }
    }
    let plan = scripted(random, nodes, copies, script);
    Plan { spread: 1 + random.index(3), blocks: [4, 64, 4_000][random.index(3)], ..plan }
}

/// Parts: 0 the head.
fn frames(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    for _ in 0..1 + random.index(3) {
        match random.index(3) {
            0 => script.push(Step::TakeOver(1)),
            1 => script.push(Step::TakeOver(2)),
            _ => script.extend([Step::Kill(0, power_off(random)), wait(random, 1_300, 2_600), Step::Boot(0)]),
        }
        script.extend([wait(random, 1_000, 3_000), Step::Cast]);
    }
    let copies = 2 + random.index(2);
    let plan = scripted(random, 3, copies, script);
    let mut ppm = |most: u64| u32::try_from(random.below(most)).expect("below a million");
    let segments = Quality { loss_ppm: ppm(300_000), twice_ppm: ppm(300_000), ..Quality::good() };
    Plan { segments, is_flooded: false, ..plan }
}

fn calm(random: &mut Random) -> Plan {
    let mut troubles = vec![
        Trouble::RestartControl,
        Trouble::Leases,
        Trouble::Compaction,
        Trouble::NoMetadata,
        Trouble::SlowMetadata,
        Trouble::Unknown,
    ];
    random.shuffle(&mut troubles);
    troubles.truncate(1 + random.index(6));
    let nodes = 2 + random.index(4);
    let copies = 2 + random.index((nodes - 1).min(2));
    Plan {
        volumes: 1 + random.index(2),
        spread: 1 + random.index(3),
        trouble_ns: random.range(8_000 * MS..25_000 * MS),
        pause_ns: random.range(200 * MS..3_000 * MS),
        troubles,
        is_calm: true,
        // Who owns nothing grants nothing, and would take over as soon as those who do have lost their leases.
        is_open_to_all: false,
        initiator: Kind::Hasty,
        ..scripted(random, nodes, copies, Vec::new())
    }
}

/// Parts: 0 the head, 1 a member that goes and comes.
fn control(random: &mut Random) -> Plan {
    let mut script = Vec::new();
    if random.one_in(6) {
        // Exports come and go while requests on another volume wait for a member that is silent.
        script.extend([Step::Kill(1, power_off(random)), wait(random, 1, 900), Step::TakeOther(0)]);
        script.extend([wait(random, 14_000, 17_000), Step::Boot(1), wait(random, 100, 2_500)]);
        return Plan { volumes: 2, ..scripted(random, 3, 2, script) };
    }
    if random.one_in(6) {
        // That a member is in sync again is on its way when both end; the head comes back without its map, goes on without the member,
        // and ends again.
        script.extend([Step::Kill(1, power_off(random)), wait(random, 1_500, 2_600), Step::Boot(1)]);
        script.extend([wait(random, 5, 200), Step::Late(random.range(6_000 * MS..9_000 * MS))]);
        // A replica that has started opens nothing for as long as a grant lasts.
        script.push(wait(random, 1_000, 2_000));
        script.extend([Step::Kill(1, power_off(random)), wait(random, 1, 100), Step::Kill(0, Power::Off)]);
        script.extend([Step::AnswersLost(0), Step::Boot(0), wait(random, 5_000, 9_000)]);
        if random.coin() {
            script.extend([Step::Kill(0, power_off(random)), wait(random, 1, 300)]);
        }
        script.extend([Step::Boot(1), wait(random, 3_500, 6_000), Step::Boot(0), wait(random, 100, 2_500)]);
        return scripted(random, 3, 2, script);
    }
    for _ in 0..1 + random.index(3) {
        match random.index(4) {
            // It is to be called stale, or to be taken in again.
            0 => script.extend([Step::Kill(1, power_off(random)), wait(random, 800, 1_500)]),
            1 => {
                script.extend([Step::Kill(1, power_off(random)), wait(random, 1_500, 2_600), Step::Boot(1)]);
                script.push(wait(random, 5, 600));
            }
            2 => script.extend([Step::HandOver(1), wait(random, 1, 300)]),
            // Nobody is asked whether the head may be replaced: its silence is waited for.
            _ => script.extend([Step::Kill(0, power_off(random)), wait(random, 500, 2_500)]),
        }
        for _ in 0..1 + random.index(2) {
            script.push(match random.index(8) {
                0 => Step::AnswersLost(100),
                1 => Step::MetadataAway(true),
                2 => Step::NoMetadata(random.index(3)),
                3 => Step::Late(random.magnitude(50 * MS..4_000 * MS)),
                4 => Step::Compact,
                5 => Step::LoseLease(random.index(3)),
                6 => Step::LoseLeases,
                _ => Step::Wait(0),
            });
            script.push(wait(random, 1, 500));
        }
        let who = random.index(3);
        match random.index(5) {
            0 => script.push(Step::RestartControl(who)),
            1 => script.extend([Step::KillControl(who), wait(random, 5, 3_000), Step::Boot(who)]),
            2 => script.extend([
                Step::KillControl(who),
                Step::Restart(who),
                wait(random, 5, 900),
                Step::Boot(who),
            ]),
            3 => script.extend([Step::Kill(who, Power::Off), wait(random, 1, 200), Step::Boot(who)]),
            _ => script.push(Step::Restart(who)),
        }
        script.push(wait(random, 5, 1_500));
        if random.coin() {
            script.extend([Step::Kill(1, power_off(random)), wait(random, 100, 2_500)]);
        }
        script.extend([Step::AnswersLost(0), Step::MetadataAway(false), Step::Boot(0), Step::Boot(1)]);
        script.extend([wait(random, 100, 3_500), Step::Cast]);
    }
    let copies = 2 + random.index(2);
    let plan = scripted(random, 3, copies, script);
    Plan { volumes: 1 + random.index(2), ..plan }
}
