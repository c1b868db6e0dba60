//! The embedded store against crashes, faults and damage, at every operation and byte, on a disk in memory; and
//! against the real file system for what only that shows.

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::codec::{
    FRAME_HEAD_BYTES, HEADER_BYTES, Identity, Parsed, encode_file, parse, put_frame, put_record,
};
use super::sim_disk::{Fault, Random, SimDisk, Survival};
use super::*;
use crate::meta::{Compare, Event, Op};

/// Small, so that a short workload writes the journal anew several times.
const REWRITE_BYTES: u64 = 400;
const HISTORY: usize = 1 << 20;

type Keys = BTreeMap<String, Vec<u8>>;

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

async fn open(disk: &SimDisk) -> Result<Core<SimDisk>, OpenJournalError> {
    Core::open(disk.clone(), HISTORY, REWRITE_BYTES).await
}

fn keys(core: &Core<SimDisk>) -> Keys {
    let entries = core.published.read(|state| state.list("")).entries;
    entries.into_iter().map(|entry| (entry.key, entry.value)).collect()
}

/// Processes transactions as one batch; what they came to.
async fn batch(core: &mut Core<SimDisk>, txns: &[Txn], now_ms: u64) -> Vec<Result<TxnOutcome, MetaError>> {
    let mut answers = Vec::new();
    let mut commands = Vec::new();
    for txn in txns {
        let (answer, answered) = oneshot::channel();
        commands.push(Command::Txn(txn.clone(), answer));
        answers.push(answered);
    }
    core.process(&mut commands, now_ms).await;
    let mut outcomes = Vec::new();
    for answer in answers {
        outcomes.push(answer.await.unwrap());
    }
    outcomes
}

async fn one<T>(
    core: &mut Core<SimDisk>,
    now_ms: u64,
    command: impl FnOnce(Answer<T>) -> Command,
) -> Result<T, MetaError> {
    let (answer, answered) = oneshot::channel();
    core.process(&mut vec![command(answer)], now_ms).await;
    answered.await.unwrap()
}

/// What the keys are, and what they may be because an outcome is unknown.
#[derive(Clone, Default)]
struct Model {
    known: Keys,
    possible: Keys,
}

impl Model {
    /// Takes the outcomes of a batch; whether the store can still be used.
    fn take(&mut self, txns: &[Txn], outcomes: &[Result<TxnOutcome, MetaError>]) -> bool {
        let mut usable = true;
        for (txn, outcome) in txns.iter().zip(outcomes) {
            match outcome {
                Ok(TxnOutcome::Committed(_)) => {
                    apply(&mut self.known, txn);
                    apply(&mut self.possible, txn);
                }
                Ok(TxnOutcome::Conflict) => panic!("the workload has no conflicts"),
                Err(MetaError::Unknown(_)) => {
                    apply(&mut self.possible, txn);
                    usable = false;
                }
                Err(MetaError::Unavailable(_)) => {}
                Err(error) => panic!("{error}"),
            }
        }
        usable
    }

    fn allows(&self, found: &Keys) -> bool {
        *found == self.known || *found == self.possible
    }
}

fn apply(keys: &mut Keys, txn: &Txn) {
    for op in &txn.ops {
        match op {
            Op::Put { key, value, .. } => drop(keys.insert(key.clone(), value.clone())),
            Op::Delete { key } => drop(keys.remove(key)),
        }
    }
}

/// Batches of one to three transactions over few keys, with values of 0 to 88 bytes.
fn workload() -> Vec<Vec<Txn>> {
    let mut random = Random::new(7);
    let mut batches = Vec::new();
    for _ in 0..14 {
        let mut txns = Vec::new();
        for _ in 0..=random.below(3) {
            let key = format!("k{}", random.below(4));
            let value = random.next().to_le_bytes().repeat(random.below(12).try_into().unwrap());
            let other = format!("d{}", random.below(2));
            let txn = Txn::new().put(key, value);
            txns.push(if random.below(2) == 0 { txn.delete(other) } else { txn.put(other, "x") });
        }
        batches.push(txns);
    }
    batches
}

/// Runs the workload until a fault stops it.
async fn run(disk: &SimDisk) -> Model {
    let mut model = Model::default();
    let Ok(mut core) = open(disk).await else { return model };
    for (step, txns) in workload().iter().enumerate() {
        let outcomes = batch(&mut core, txns, step as u64).await;
        if !model.take(txns, &outcomes) {
            return model;
        }
    }
    core.close().await;
    model
}

/// Opens a disk, checks what is found, and that the store can be used and keeps what it is given.
async fn check(disk: &SimDisk, model: &Model, what: &str) {
    let mut core = open(disk).await.unwrap_or_else(|error| panic!("{what}: does not open: {error:?}"));
    let mut found = keys(&core);
    assert!(
        model.allows(&found),
        "{what}: found {found:?}\nexpected {:?}\nor {:?}",
        model.known,
        model.possible
    );
    let txn = Txn::new().put("after", "crash");
    assert!(
        batch(&mut core, std::slice::from_ref(&txn), 0).await[0]
            .as_ref()
            .is_ok_and(|outcome| outcome.committed()),
        "{what}"
    );
    apply(&mut found, &txn);
    drop(core);
    let disk = disk.crash(Survival::Prefix { bytes: 0, names: false });
    let again = open(&disk).await;
    assert_eq!(disk.names(), [JOURNAL], "{what}: something is left behind");
    assert_eq!(
        keys(&again.unwrap_or_else(|error| panic!("{what}: {error:?}"))),
        found,
        "{what}: a write was lost"
    );
}

fn survivals(disk: &SimDisk, byte_step: usize) -> Vec<Survival> {
    let bytes = (0..disk.unsynced_bytes()).step_by(byte_step).chain([disk.unsynced_bytes()]);
    let mut survivals = Vec::new();
    for bytes in bytes {
        survivals.extend([false, true].map(|names| Survival::Prefix { bytes, names }));
    }
    survivals.extend((0..8).map(|seed| Survival::Sectors { seed }));
    survivals
}

/// Operations of the whole workload without faults.
async fn operations() -> usize {
    let disk = SimDisk::default();
    let model = run(&disk).await;
    assert_eq!(model.known, model.possible);
    assert!(disk.operations() > 60, "only {} operations", disk.operations());
    disk.operations()
}

#[test]
fn a_crash_at_any_operation_and_byte_loses_nothing_acknowledged() {
    block_on(async {
        for operation in 0..operations().await {
            let disk = SimDisk::default();
            disk.fail(operation, Fault::Crash);
            let model = run(&disk).await;
            for survival in survivals(&disk, 1) {
                check(&disk.crash(survival), &model, &format!("crash at {operation}, {survival:?}")).await;
            }
        }
    });
}

#[test]
fn a_crash_while_opening_after_a_crash_loses_nothing_acknowledged() {
    block_on(async {
        for operation in 0..operations().await {
            let disk = SimDisk::default();
            disk.fail(operation, Fault::Crash);
            let model = run(&disk).await;
            for first in survivals(&disk, 37) {
                for second_operation in 0.. {
                    let disk = disk.crash(first);
                    disk.fail(second_operation, Fault::Crash);
                    if open(&disk).await.is_ok() {
                        break;
                    }
                    for second in survivals(&disk, 37) {
                        let what = format!(
                            "crash at {operation}, {first:?}, then at {second_operation}, {second:?}"
                        );
                        check(&disk.crash(second), &model, &what).await;
                    }
                }
            }
        }
    });
}

#[test]
fn a_failed_operation_loses_nothing_acknowledged() {
    block_on(async {
        for fault in [Fault::Io, Fault::NoSpace] {
            for operation in 0..operations().await {
                let disk = SimDisk::default();
                disk.fail(operation, fault);
                let model = run(&disk).await;
                for survival in survivals(&disk, 17) {
                    let what = format!("{fault:?} at {operation}, {survival:?}");
                    check(&disk.crash(survival), &model, &what).await;
                    check(&disk.restart(), &model, &what).await;
                }
            }
        }
    });
}

#[test]
fn what_was_read_once_after_a_failed_sync_stays() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        let before = disk.operations();
        disk.fail(before + 1, Fault::Io);
        let outcome = batch(&mut core, &[Txn::new().put("k", "v")], 0).await.pop().unwrap();
        assert!(matches!(outcome, Err(MetaError::Unknown(_))), "{outcome:?}");
        let disk = disk.restart();
        let found = keys(&open(&disk).await.unwrap());
        assert_eq!(found.len(), 1, "the cache still shows the write");
        let after = open(&disk.crash(Survival::Prefix { bytes: 0, names: false })).await.unwrap();
        assert_eq!(keys(&after), found, "it was served, so it must be durable");
    });
}

#[test]
fn a_failed_sync_ends_the_use_of_the_store() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        let mut watch = core.published.watch("", Revision(1));
        disk.fail(disk.operations() + 1, Fault::Io);
        let txns = [Txn::new().put("a", "1"), Txn::new().when(Compare::Exists("a".into())).put("b", "")];
        let outcomes = batch(&mut core, &txns, 0).await;
        assert!(outcomes.iter().all(|outcome| matches!(outcome, Err(MetaError::Unknown(_)))), "{outcomes:?}");
        assert!(matches!(watch.next().await, Err(WatchEnd::Lost { .. })));
        let again = batch(&mut core, &[Txn::new().put("c", "")], 0).await.pop().unwrap();
        assert!(again.is_err_and(|error| error.to_string().contains("fdatasync")));
        assert!(core.broken.get().is_some());
        assert_eq!(keys(&core), Keys::new(), "nothing is shown that is not durable");
    });
}

#[test]
fn a_full_disk_refuses_and_recovers() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        batch(&mut core, &[Txn::new().put("a", "1")], 0).await;
        let whole = disk.bytes(JOURNAL);
        disk.fail(disk.operations(), Fault::NoSpace);
        let txns = [Txn::new().put("b", "2"), Txn::new().when(Compare::Absent("b".into())).put("c", "3")];
        let refused = batch(&mut core, &txns, 0).await;
        assert_eq!(disk.bytes(JOURNAL), whole);
        assert!(
            refused.iter().all(|outcome| matches!(outcome, Err(MetaError::Unavailable(_)))),
            "{refused:?}"
        );
        let accepted = batch(&mut core, &txns[1..], 0).await;
        assert_eq!(
            accepted,
            [Ok(TxnOutcome::Committed(Revision(3)))],
            "nothing of the refused batch is left"
        );
        let reopened = open(&disk.crash(Survival::Prefix { bytes: 0, names: false })).await.unwrap();
        assert_eq!(keys(&reopened).into_keys().collect::<Vec<_>>(), ["a", "c"]);
    });
}

#[test]
fn a_lease_that_cannot_be_ended_for_lack_of_space_is_ended_later() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        let lease = one(&mut core, 0, |answer| Command::Grant(100, answer)).await.unwrap();
        batch(&mut core, &[Txn::new().put_leased("k", "", lease)], 0).await;
        assert_eq!(core.next_expiry_ms(), Some(100));
        disk.fail(disk.operations(), Fault::NoSpace);
        core.process(&mut Vec::new(), 100).await;
        assert_eq!(keys(&core).len(), 1);
        assert_eq!(core.next_expiry_ms(), Some(100 + RETRY_MS), "not tried again at once");
        core.process(&mut Vec::new(), 100 + RETRY_MS).await;
        assert_eq!(keys(&core), Keys::new());
        assert_eq!(core.next_expiry_ms(), None);
    });
}

#[test]
fn a_renewal_that_waited_is_taken_before_leases_end() {
    block_on(async {
        let mut core = open(&SimDisk::default()).await.unwrap();
        let lease = one(&mut core, 0, |answer| Command::Grant(100, answer)).await.unwrap();
        let left = one(&mut core, 150, |answer| Command::KeepAlive(lease, answer)).await;
        assert_eq!(left, Ok(Duration::from_millis(100)));
        assert_eq!(core.next_expiry_ms(), Some(250));
        let gone = one(&mut core, 250, |answer| Command::Revoke(lease, answer)).await;
        assert_eq!(gone, Ok(()), "revoked by the request, not a second time by its end");
        assert_eq!(core.next_expiry_ms(), None);
    });
}

#[test]
fn waiting_requests_share_one_write() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        let before = disk.operations();
        let txns: Vec<_> = (0..50).map(|index| Txn::new().put(format!("k{index}"), "")).collect();
        assert!(batch(&mut core, &txns, 0).await.iter().all(Result::is_ok));
        let rewrite_operations = 5;
        assert_eq!(disk.operations() - before, 2 + rewrite_operations);
        let reads = [Txn::new().when(Compare::Absent("k1".into()))];
        let before = disk.operations();
        assert_eq!(batch(&mut core, &reads, 0).await, [Ok(TxnOutcome::Conflict)]);
        assert_eq!(disk.operations(), before, "an answer that changes nothing writes nothing");
    });
}

#[test]
fn leases_survive_with_their_full_time_and_their_ids_are_not_reused() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = open(&disk).await.unwrap();
        let kept = one(&mut core, 0, |answer| Command::Grant(5000, answer)).await.unwrap();
        let gone = one(&mut core, 0, |answer| Command::Grant(5000, answer)).await.unwrap();
        batch(&mut core, &[Txn::new().put_leased("k", "", kept).put("filler", vec![0; 500])], 10).await;
        one(&mut core, 10, |answer| Command::Revoke(gone, answer)).await.unwrap();
        for journal in ["appended", "rewritten"] {
            if journal == "rewritten" {
                core.journal.rewrite(&core.ahead).await.unwrap();
            }
            let mut core = open(&disk.restart()).await.unwrap();
            assert_eq!(core.next_expiry_ms(), Some(5000), "{journal}");
            assert_eq!(core.published.read(|state| state.get("k")).unwrap().lease, Some(kept));
            let next = one(&mut core, 0, |answer| Command::Grant(5000, answer)).await.unwrap();
            assert!(next > gone, "{journal}: {next} was given before");
            core.process(&mut Vec::new(), 5000).await;
            assert_eq!(keys(&core).into_keys().collect::<Vec<_>>(), ["filler"]);
        }
    });
}

#[test]
fn history_is_bounded_by_its_bytes() {
    block_on(async {
        let mut core = Core::open(SimDisk::default(), 10_000, 1 << 20).await.unwrap();
        for _ in 0..20 {
            batch(&mut core, &[Txn::new().put("k", vec![0; 900])], 0).await;
        }
        let from = |revision| core.published.watch("", Revision(revision));
        let Err(WatchEnd::Compacted { compacted }) = from(2).next().await else {
            panic!("all of it is kept")
        };
        let kept = from(compacted.0 + 1).next().await.unwrap();
        assert!((9..=10).contains(&kept.len()), "{} of 20 changes of 0.9 kB in 10 kB", kept.len());
    });
}

#[test]
fn history_goes_back_to_the_last_snapshot() {
    block_on(async {
        let disk = SimDisk::default();
        let mut core = Core::open(disk.clone(), HISTORY, 1 << 20).await.unwrap();
        for value in ["1", "2", "3"] {
            batch(&mut core, &[Txn::new().put("k", value)], 0).await;
        }
        let reopened = open(&disk.restart()).await.unwrap();
        let events = reopened.published.watch("", Revision(2)).next().await.unwrap();
        assert_eq!(events.iter().map(Event::revision).collect::<Vec<_>>(), [2, 3, 4].map(Revision));
        core.journal.rewrite(&core.ahead).await.unwrap();
        let reopened = open(&disk.restart()).await.unwrap();
        let end = reopened.published.watch("", Revision(4)).next().await;
        assert_eq!(end, Err(WatchEnd::Compacted { compacted: Revision(4) }));
        assert_eq!(
            core.published.watch("", Revision(2)).next().await.unwrap().len(),
            3,
            "the running one keeps it"
        );
    });
}

/// A journal with a snapshot and several frames, closed or not.
async fn sample(closed: bool) -> (SimDisk, Keys) {
    let disk = SimDisk::default();
    let mut core = Core::open(disk.clone(), HISTORY, 1 << 20).await.unwrap();
    batch(&mut core, &[Txn::new().put("first", "1")], 0).await;
    core.journal.rewrite(&core.ahead).await.unwrap();
    for index in 0..3 {
        batch(&mut core, &[Txn::new().put(format!("k{index}"), "value")], 0).await;
    }
    if closed {
        core.close().await;
    }
    let keys = keys(&core);
    (disk, keys)
}

fn last_frame(file: &[u8]) -> usize {
    usize::try_from(parse(file, HISTORY).unwrap().last_frame).unwrap()
}

#[test]
fn any_changed_byte_is_refused_or_cut_with_the_last_frame() {
    block_on(async {
        for closed in [false, true] {
            let (disk, all) = sample(closed).await;
            let file = disk.bytes(JOURNAL);
            let last = last_frame(&file);
            for offset in 0..file.len() {
                let disk = disk.restart();
                disk.damage(JOURNAL, offset, 1 << (offset % 8));
                match open(&disk).await {
                    Ok(core) => {
                        assert!(offset >= last, "byte {offset} of {} changed unnoticed", file.len());
                        let mut expected = all.clone();
                        if !closed {
                            expected.remove("k2");
                        }
                        assert_eq!(keys(&core), expected);
                    }
                    Err(OpenJournalError::Damage(Damage::At { offset: found, .. })) => {
                        assert!(offset < last, "byte {offset}, last frame at {last}");
                        assert!(found <= offset as u64);
                        assert_eq!(
                            disk.bytes(JOURNAL)[last..],
                            file[last..],
                            "a damaged journal is not written to"
                        );
                    }
                    Err(OpenJournalError::Damage(Damage::Version(_))) => assert!((8..10).contains(&offset)),
                    Err(OpenJournalError::Io(error)) => panic!("{error}"),
                }
            }
        }
    });
}

#[test]
fn a_frame_within_a_value_is_not_taken_for_one() {
    block_on(async {
        let (disk, _) = sample(false).await;
        let copy = disk.bytes(JOURNAL);
        let mut core = Core::open(disk.clone(), HISTORY, 1 << 20).await.unwrap();
        batch(&mut core, &[Txn::new().put("copy", copy)], 0).await;
        let file = disk.bytes(JOURNAL);
        for cut in last_frame(&file) + 1..file.len() {
            let parsed = parse(&file[..cut], HISTORY).unwrap();
            assert_eq!(parsed.end, last_frame(&file) as u64, "cut at {cut}");
        }
    });
}

fn states() -> impl Strategy<Value = Vec<Record>> {
    let op = (0u8..6, prop::option::of(prop::collection::vec(any::<u8>(), 0..40)));
    let record = prop_oneof![
        4 => prop::collection::btree_map(0u8..6, op, 1..4).prop_map(|ops| {
            let ops = ops.into_iter().map(|(key, (lease, value))| match value {
                Some(value) => {
                    let lease = Some(LeaseId(i64::from(lease))).filter(|lease| lease.0 > 3);
                    Op::Put { key: format!("k{key}"), value, lease }
                }
                None => Op::Delete { key: format!("k{key}") },
            });
            Record::Write { revision: Revision(0), ops: ops.collect() }
        }),
        1 => (1u64..u64::MAX).prop_map(|ttl_ms| Record::Grant { lease: LeaseId(0), ttl_ms }),
        1 => (1i64..8).prop_map(|lease| Record::Revoke { lease: LeaseId(lease), revision: Revision(0) }),
    ];
    prop::collection::vec(record, 0..24)
}

/// Turns records made up at random into ones that follow from each other.
fn follow(state: &mut State, records: Vec<Record>) -> Vec<Record> {
    let mut followed = Vec::new();
    for record in records {
        let planned = match record {
            Record::Write { ops, .. } => match state.plan(Txn { compares: Vec::new(), ops }) {
                Ok(Plan::Write(record)) => record,
                _ => continue,
            },
            Record::Grant { ttl_ms, .. } => state.plan_grant(ttl_ms),
            Record::Revoke { lease, .. } => match state.plan_revoke(lease) {
                Ok(record) => record,
                Err(_) => continue,
            },
        };
        state.apply(&planned).unwrap();
        followed.push(planned);
    }
    followed
}

fn encode(records: &[Record], split: usize) -> (Vec<u8>, State) {
    let identity = Identity { store: [1; 16], salt: [2; 16] };
    let mut state = State::new(HISTORY);
    let (before, behind) = records.split_at(split.min(records.len()));
    before.iter().for_each(|record| state.apply(record).unwrap());
    let (mut file, mut sequence) = encode_file(&identity, &state);
    for record in behind {
        let mut payload = Vec::new();
        put_record(&mut payload, record);
        put_frame(&mut file, &identity.salt, sequence, &payload);
        sequence += 1;
        state.apply(record).unwrap();
    }
    (file, state)
}

fn assert_same(parsed: &Parsed, state: &State) {
    assert_eq!(parsed.state.list(""), state.list(""));
    assert_eq!(parsed.state.leases().collect::<Vec<_>>(), state.leases().collect::<Vec<_>>());
    assert_eq!(parsed.state.last_lease(), state.last_lease());
}

proptest! {
    #[test]
    fn any_bytes_are_parsed_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..400)) {
        prop_assert!(parse(&bytes, HISTORY).is_err(), "random bytes are no journal");
    }

    /// Bytes behind a good head get past the first checks.
    #[test]
    fn any_records_in_good_frames_are_parsed_or_refused(
        payloads in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..60), 1..4),
        first in 0u8..8,
    ) {
        let (mut file, _) = encode(&[], 0);
        for (payload, sequence) in payloads.iter().zip(2..) {
            let mut payload = payload.clone();
            payload.insert(0, first);
            put_frame(&mut file, &[2; 16], sequence, &payload);
        }
        let _ = parse(&file, HISTORY);
    }

    #[test]
    fn what_is_written_is_read(records in states(), split in 0usize..24) {
        let records = follow(&mut State::new(HISTORY), records);
        let (file, state) = encode(&records, split);
        let parsed = parse(&file, HISTORY).unwrap();
        assert_same(&parsed, &state);
        prop_assert_eq!(parsed.end, file.len() as u64);
    }

    #[test]
    fn a_changed_journal_is_parsed_or_refused(
        records in states(),
        split in 0usize..24,
        edits in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..5),
    ) {
        let records = follow(&mut State::new(HISTORY), records);
        let (mut file, _) = encode(&records, split);
        for (at, byte, edit) in edits {
            let at = at.index(file.len() + 1);
            match edit {
                0 => file.truncate(at),
                1 => file.insert(at, byte),
                2 if at < file.len() => file[at] = byte,
                3 if at < file.len() => drop(file.remove(at)),
                _ => {}
            }
        }
        if let Ok(parsed) = parse(&file, HISTORY) {
            prop_assert!(parsed.end <= file.len() as u64);
            prop_assert!(parsed.state.revision() >= Revision(1));
        }
    }
}

#[test]
fn a_newer_format_is_refused_by_its_number() {
    let (mut file, _) = encode(&[], 0);
    file[8] = 9;
    assert_eq!(parse(&file, HISTORY).unwrap_err(), Damage::Version(9));
}

#[tokio::test]
async fn a_directory_keeps_its_store() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("deep/meta");
    let store = EmbeddedStore::open(&path).await.unwrap();
    let identity = store.identity().await.unwrap();
    for round in 0..40 {
        let txn = (0..16).fold(Txn::new(), |txn, key| txn.put(format!("k{key}"), vec![round; 4096]));
        assert!(store.txn(txn).await.unwrap().committed());
    }
    let before = store.list("").await.unwrap();
    drop(store);
    let bytes = fs::metadata(path.join(JOURNAL)).unwrap().len();
    assert!(
        bytes < 2 * 1024 * 1024,
        "{bytes} bytes: 2.6 MB were written, the journal is compacted above 1 MiB"
    );
    assert!(!path.join("journal.new").exists());
    let store = EmbeddedStore::open(&path).await.unwrap();
    assert_eq!(store.list("").await.unwrap(), before);
    assert_eq!(store.identity().await.unwrap(), identity);
}

#[tokio::test]
async fn a_second_process_is_refused_until_the_first_is_gone() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path()).await.unwrap();
    let error = EmbeddedStore::open(dir.path()).await.err().unwrap().to_string();
    assert!(error.contains(&format!("in use by process {}", std::process::id())), "{error}");
    store.txn(Txn::new().put("k", "v")).await.unwrap();
    let mut watch = store.watch("", Revision(3)).await.unwrap();
    drop(store);
    assert!(matches!(watch.next().await, Err(WatchEnd::Lost { .. })), "a watch ends with its store");
    let store = EmbeddedStore::open(dir.path()).await.unwrap();
    assert_eq!(store.get("k").await.unwrap().unwrap().value, b"v");
}

#[tokio::test]
async fn a_torn_tail_of_a_real_file_is_cut() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join(JOURNAL);
    drop(EmbeddedStore::open(dir.path()).await.unwrap());
    let whole = fs::metadata(&path).unwrap().len();
    let mut file = fs::OpenOptions::new().append(true).open(&path).unwrap();
    file.write_all(&[0xee; FRAME_HEAD_BYTES + 7]).unwrap();
    let store = EmbeddedStore::open(dir.path()).await.unwrap();
    assert_eq!(fs::metadata(&path).unwrap().len(), whole);
    store.txn(Txn::new().put("k", "v")).await.unwrap();
    drop(store);
    let store = EmbeddedStore::open(dir.path()).await.unwrap();
    assert!(store.get("k").await.unwrap().is_some());
}

#[tokio::test]
async fn damage_is_refused_with_its_place() {
    let dir = tempfile::tempdir().unwrap();
    let store = EmbeddedStore::open(dir.path()).await.unwrap();
    store.txn(Txn::new().put("k", "v")).await.unwrap();
    drop(store);
    let path = dir.path().join(JOURNAL);
    let mut bytes = fs::read(&path).unwrap();
    bytes[HEADER_BYTES + FRAME_HEAD_BYTES] ^= 1;
    fs::write(&path, &bytes).unwrap();
    let error = EmbeddedStore::open(dir.path()).await.err().unwrap().to_string();
    assert!(error.contains(&format!("{} is damaged at byte {HEADER_BYTES}", path.display())), "{error}");
    assert_eq!(fs::read(&path).unwrap(), bytes, "a damaged journal is not written to");
    fs::write(&path, b"").unwrap();
    let error = EmbeddedStore::open(dir.path()).await.err().unwrap().to_string();
    assert!(error.contains("is damaged at byte 0"), "{error}");
}

#[tokio::test]
async fn a_directory_that_cannot_be_made_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "").unwrap();
    let error = EmbeddedStore::open(file.join("meta")).await.err().unwrap().to_string();
    assert!(error.contains("file/meta: create the directory: "), "{error}");
}
