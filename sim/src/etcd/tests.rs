use super::*;

const ONE: ClientId = ClientId(0);
const TWO: ClientId = ClientId(1);
const SECOND: u64 = 1_000_000_000;
const WATCH: WatchId = WatchId(7);

struct Lab {
    etcd: Etcd,
    now_ns: u64,
    requests: u64,
    /// What came beside an answer that was waited for.
    unread: Vec<Output>,
}

impl Lab {
    fn new(seed: u64) -> Self {
        Self { etcd: Etcd::new(Setup::new(2), Random::new(seed)), now_ns: 0, requests: 0, unread: Vec::new() }
    }

    fn run(&mut self, by_ns: u64) -> Vec<Output> {
        let limit_ns = self.now_ns + by_ns;
        let mut outputs = std::mem::take(&mut self.unread);
        while let Some((at_ns, output)) = self.etcd.pop(limit_ns) {
            assert!(at_ns >= self.now_ns);
            self.now_ns = at_ns;
            outputs.push(output);
        }
        self.now_ns = limit_ns;
        outputs
    }

    fn send(&mut self, client: ClientId, request: Request) -> RequestId {
        self.requests += 1;
        let id = RequestId(self.requests);
        self.etcd.request(self.now_ns, client, id, request);
        id
    }

    /// Sends a request and waits for the answer.
    fn ask(&mut self, client: ClientId, request: Request) -> Result<Reply, Error> {
        let id = self.send(client, request);
        let until_ns = self.now_ns + 20 * SECOND;
        while let Some((at_ns, output)) = self.etcd.pop(until_ns) {
            self.now_ns = at_ns;
            match output {
                Output::Answer { request, result, .. } if request == id => return result,
                other => self.unread.push(other),
            }
        }
        panic!("no answer to {id:?}");
    }

    fn txn(&mut self, client: ClientId, txn: Txn) -> Result<TxnOutcome, Error> {
        match self.ask(client, Request::Txn(txn))? {
            Reply::Txn(outcome) => Ok(outcome),
            other => panic!("{other:?}"),
        }
    }

    fn put(&mut self, key: &str, value: &str) -> Revision {
        match self.txn(ONE, Txn::new().put(key, value)) {
            Ok(TxnOutcome::Committed(revision)) => revision,
            other => panic!("{other:?}"),
        }
    }

    fn lease(&mut self, ttl_ns: u64) -> LeaseId {
        match self.ask(ONE, Request::Grant { ttl_ns }) {
            Ok(Reply::Granted { lease, .. }) => lease,
            other => panic!("{other:?}"),
        }
    }

    fn watch(&mut self, client: ClientId, prefix: &str, from: Revision) {
        let request = Request::Watch { watch: WATCH, prefix: prefix.into(), from };
        assert_eq!(self.ask(client, request), Ok(Reply::Watching { watch: WATCH }));
    }
}

fn seen(outputs: &[Output], whose: ClientId) -> Vec<(i64, String)> {
    let changes = outputs.iter().filter_map(|output| match output {
        Output::Changes { client, events, .. } if *client == whose => Some(events),
        _ => None,
    });
    changes.flatten().map(|event| (event.revision().0, event.key().to_owned())).collect()
}

fn end_of_watch(outputs: &[Output], whose: ClientId) -> Option<WatchEnd> {
    outputs.iter().find_map(|output| match output {
        Output::WatchEnded { client, end, .. } if *client == whose => Some(*end),
        _ => None,
    })
}

#[test]
fn transactions_compare_and_swap() {
    let mut lab = Lab::new(1);
    assert_eq!(lab.etcd.revision(), Revision(1));
    let first = lab.put("a", "1");
    assert_eq!(first, Revision(2));
    let swap = |compare| Txn::new().when(compare).put("a", "2").put("b", "2");
    let conflict = Ok(TxnOutcome::Conflict);
    let key = || "a".to_owned();
    for compare in [
        Compare::Absent(key()),
        Compare::Exists("b".into()),
        Compare::Revision(key(), Revision(1)),
        Compare::Created("b".into(), Revision(1)),
        Compare::Version(key(), 2),
        Compare::Value(key(), b"2".to_vec()),
    ] {
        assert_eq!(lab.txn(TWO, swap(compare.clone())), conflict, "{compare:?}");
    }
    assert_eq!(lab.txn(TWO, swap(Compare::Revision(key(), first))), Ok(TxnOutcome::Committed(Revision(3))));
    for compare in [
        Compare::Exists(key()),
        Compare::Absent("c".into()),
        Compare::Created(key(), first),
        Compare::Version(key(), 2),
        Compare::Value(key(), b"2".to_vec()),
    ] {
        let unchanged = Txn::new().when(compare).delete("c");
        assert_eq!(lab.txn(TWO, unchanged), Ok(TxnOutcome::Committed(Revision(3))));
    }
    let Ok(Reply::Snapshot(all)) = lab.ask(ONE, Request::List { prefix: String::new() }) else { panic!() };
    let held: Vec<_> = all
        .entries
        .iter()
        .map(|kv| (kv.key.as_str(), kv.create_revision.0, kv.mod_revision.0, kv.version))
        .collect();
    assert_eq!(held, [("a", 2, 3, 2), ("b", 3, 3, 1)]);
    assert_eq!(lab.txn(ONE, Txn::new().delete("a")), Ok(TxnOutcome::Committed(Revision(4))));
    lab.put("a", "3");
    assert_eq!(lab.etcd.peek("a").map(|kv| (kv.create_revision.0, kv.version)), Some((5, 1)));
}

#[test]
fn transactions_have_limits() {
    let mut lab = Lab::new(1);
    let many = |count: usize| (0..count).fold(Txn::new(), |txn, number| txn.put(format!("k{number}"), "v"));
    assert_eq!(lab.txn(ONE, many(129)), Err(Error::Invalid));
    assert!(lab.txn(ONE, many(128)).is_ok());
    assert_eq!(lab.txn(ONE, Txn::new().put("a", "1").delete("a")), Err(Error::Invalid));
    let compares = (0..129).fold(Txn::new(), |txn, _| txn.when(Compare::Absent("x".into())));
    assert_eq!(lab.txn(ONE, compares), Err(Error::Invalid));
    assert_eq!(lab.etcd.revision(), Revision(2));
}

#[test]
fn a_lease_ends_with_its_keys_unless_it_is_renewed() {
    let mut lab = Lab::new(1);
    let lease = lab.lease(1);
    lab.txn(ONE, Txn::new().put_leased("node/1", "", lease).put("other", "")).unwrap();
    for _ in 0..10 {
        lab.run(SECOND);
        assert_eq!(lab.ask(ONE, Request::KeepAlive { lease }), Ok(Reply::Renewed { ttl_ns: 2 * SECOND }));
    }
    assert!(lab.etcd.peek("node/1").is_some());
    lab.run(2 * SECOND - 10_000_000);
    assert!(lab.etcd.peek("node/1").is_some());
    let before = lab.etcd.revision();
    lab.run(SECOND);
    assert_eq!((lab.etcd.peek("node/1"), lab.etcd.revision()), (None, before.next()));
    assert_eq!(lab.ask(ONE, Request::KeepAlive { lease }), Err(Error::LeaseGone(lease)));
    assert_eq!(lab.txn(ONE, Txn::new().put_leased("node/1", "", lease)), Err(Error::LeaseGone(lease)));
    let next = lab.lease(5 * SECOND);
    assert!(next > lease);
    lab.txn(ONE, Txn::new().put_leased("node/1", "", next)).unwrap();
    lab.txn(ONE, Txn::new().put("node/1", "kept")).unwrap();
    assert_eq!(lab.ask(TWO, Request::Revoke { lease: next }), Ok(Reply::Revoked));
    assert!(lab.etcd.peek("node/1").is_some(), "a key that was detached stays");
}

#[test]
fn all_leases_can_go_at_once() {
    let mut lab = Lab::new(1);
    for number in 0..3 {
        let lease = lab.lease(100 * SECOND);
        lab.txn(ONE, Txn::new().put_leased(format!("node/{number}"), "", lease)).unwrap();
    }
    let before = lab.etcd.revision();
    lab.etcd.revoke_all_leases(lab.now_ns);
    assert_eq!(lab.etcd.peek_prefix("node/").entries, []);
    assert_eq!(lab.etcd.revision().0, before.0 + 3, "a revision for each lease");
}

#[test]
fn a_watch_delivers_everything_in_order_from_its_revision_on_at_each_clients_own_time() {
    let mut apart = 0;
    for seed in 0..20 {
        let mut lab = Lab::new(seed);
        lab.put("a/1", "");
        lab.watch(ONE, "a/", Revision(2));
        lab.watch(TWO, "", Revision(4));
        let txn = Txn::new().put("a/2", "").delete("a/1");
        lab.etcd.apply(lab.now_ns, Txn::new().put("b", "")).unwrap();
        lab.etcd.apply(lab.now_ns, txn).unwrap();
        let mut at_ns = [0, 0];
        let mut outputs = std::mem::take(&mut lab.unread);
        let until_ns = lab.now_ns + SECOND;
        while let Some((now_ns, output)) = lab.etcd.pop(until_ns) {
            at_ns[output.client().0] = now_ns;
            outputs.push(output);
        }
        lab.now_ns = until_ns;
        lab.put("a/3", "");
        outputs.extend(lab.run(SECOND));
        let key = |revision: i64, key: &str| (revision, key.to_owned());
        let all = [key(2, "a/1"), key(4, "a/2"), key(4, "a/1"), key(5, "a/3")];
        assert_eq!((seen(&outputs, ONE).as_slice(), seen(&outputs, TWO).as_slice()), (&all[..], &all[1..]));
        apart += usize::from(at_ns[0] != at_ns[1]);
        let request = Request::Unwatch { watch: WATCH };
        assert_eq!(lab.ask(ONE, request), Ok(Reply::Unwatched));
        lab.put("a/4", "");
        assert_eq!(seen(&lab.run(SECOND), ONE), []);
    }
    assert!(apart > 10);
}

#[test]
fn compaction_ends_a_watch_that_is_behind_and_no_other() {
    let mut lab = Lab::new(1);
    (0..5).for_each(|number| {
        lab.put("a", &number.to_string());
    });
    lab.etcd.compact(lab.now_ns, Revision(4));
    lab.watch(ONE, "a", Revision(4));
    lab.watch(TWO, "a", Revision(5));
    let outputs = lab.run(SECOND);
    assert_eq!(end_of_watch(&outputs, ONE), Some(WatchEnd::Compacted(Revision(4))));
    assert_eq!((seen(&outputs, TWO).len(), end_of_watch(&outputs, TWO)), (2, None));
    // One that is held up long enough.
    lab.etcd.pause(TWO);
    (0..20_000).for_each(|_| {
        lab.etcd.apply(lab.now_ns, Txn::new().put("a", "")).unwrap();
    });
    lab.run(SECOND);
    lab.etcd.resume(lab.now_ns, TWO);
    assert!(matches!(end_of_watch(&lab.run(SECOND), TWO), Some(WatchEnd::Compacted(_))));
    assert!(lab.etcd.state.changes("", lab.etcd.revision().next()).is_some_events());
}

impl Changes {
    fn is_some_events(&self) -> bool {
        matches!(self, Changes::Events { events, .. } if events.is_empty())
    }
}

#[test]
fn a_long_backlog_comes_in_parts_that_keep_revisions_whole() {
    let mut lab = Lab::new(1);
    for _ in 0..50 {
        let txn = (0..100).fold(Txn::new(), |txn, number| txn.put(format!("k{number}"), ""));
        lab.etcd.apply(0, txn).unwrap();
    }
    lab.watch(ONE, "", Revision(1));
    let outputs = lab.run(SECOND);
    assert!(outputs.len() > 10);
    assert_eq!(seen(&outputs, ONE).len(), 5000);
    for output in &outputs {
        let Output::Changes { events, .. } = output else { panic!() };
        assert_eq!(events.len() % 100, 0);
    }
}

#[test]
fn a_change_with_a_fault_is_applied_or_not_as_it_says() {
    let mut lab = Lab::new(1);
    let mut change = |fault: ChangeFault, key: &str| {
        lab.etcd.fail_change(ONE, fault);
        let result = lab.txn(ONE, Txn::new().put(key, ""));
        let at_answer = lab.etcd.peek(key).is_some();
        lab.run(10 * SECOND);
        (result.unwrap_err(), at_answer, lab.etcd.peek(key).is_some())
    };
    assert_eq!(change(ChangeFault::Refused, "a"), (Error::Unavailable, false, false));
    assert_eq!(change(ChangeFault::RequestLost, "b"), (Error::Unknown, false, false));
    assert_eq!(change(ChangeFault::AnswerLost, "c"), (Error::Unknown, true, true));
    assert_eq!(change(ChangeFault::Late(6 * SECOND), "d"), (Error::Unknown, false, true));
    assert!(lab.txn(ONE, Txn::new().put("e", "")).is_ok());
}

#[test]
fn a_client_that_is_cut_off_gets_errors_and_loses_its_lease_and_its_watches() {
    let mut lab = Lab::new(2);
    let lease = lab.lease(2 * SECOND);
    lab.txn(ONE, Txn::new().put_leased("node", "", lease)).unwrap();
    lab.watch(ONE, "", Revision(1));
    lab.run(SECOND / 10);
    lab.etcd.set_reachable(lab.now_ns, ONE, false);
    assert!(lab.ask(TWO, Request::Get { key: "node".into() }).is_ok());
    let mut errors = BTreeSet::new();
    for _ in 0..20 {
        errors.insert(lab.txn(ONE, Txn::new().put("x", "")).unwrap_err().to_string());
    }
    assert_eq!(errors.len(), 2, "refused, or without an answer: {errors:?}");
    assert_eq!((lab.etcd.peek("x"), lab.etcd.peek("node")), (None, None));
    assert!(lab.etcd.watches.is_empty());
    lab.etcd.set_reachable(lab.now_ns, ONE, true);
    assert_eq!(lab.ask(ONE, Request::KeepAlive { lease }), Err(Error::LeaseGone(lease)));
}

#[test]
fn a_short_outage_costs_no_watch_and_skips_nothing() {
    let mut lab = Lab::new(2);
    lab.watch(ONE, "", Revision(2));
    lab.etcd.set_reachable(lab.now_ns, ONE, false);
    for number in 0..3 {
        lab.etcd.apply(lab.now_ns, Txn::new().put(number.to_string(), "")).unwrap();
        assert_eq!(seen(&lab.run(SECOND / 5), ONE), []);
    }
    lab.etcd.set_reachable(lab.now_ns, ONE, true);
    assert_eq!(seen(&lab.run(SECOND), ONE).len(), 3);
    assert_eq!(end_of_watch(&lab.run(20 * SECOND), ONE), None);
}

#[test]
fn without_a_leader_nothing_is_answered_and_no_lease_ends() {
    let (mut late, mut never) = (0, 0);
    for seed in 0..40 {
        let mut lab = Lab::new(seed);
        let lease = lab.lease(2 * SECOND);
        lab.txn(ONE, Txn::new().put_leased("node", "", lease)).unwrap();
        lab.etcd.set_available(lab.now_ns, false);
        let error = lab.txn(ONE, Txn::new().put("x", "")).unwrap_err();
        lab.run(10 * SECOND);
        assert!(lab.etcd.peek("x").is_none() && lab.etcd.peek("node").is_some());
        lab.etcd.set_available(lab.now_ns, true);
        assert!(lab.ask(ONE, Request::KeepAlive { lease }).is_ok());
        match (error, lab.etcd.peek("x")) {
            (Error::Unknown, Some(_)) => late += 1,
            (Error::Unavailable, None) => never += 1,
            other => panic!("{other:?}"),
        }
        lab.run(10 * SECOND);
        assert!(lab.etcd.peek("node").is_none());
    }
    assert!(late > 5 && never > 5, "{late} {never}");
}

#[test]
fn a_backup_brings_the_past_back_with_its_revisions_or_higher_ones() {
    for after in [AfterRestore::AsSaved, AfterRestore::Higher(1000)] {
        let mut lab = Lab::new(1);
        let lease = lab.lease(2 * SECOND);
        lab.txn(ONE, Txn::new().put("a", "old").put_leased("node", "", lease)).unwrap();
        let backup = lab.etcd.backup();
        lab.put("a", "new");
        lab.put("b", "new");
        lab.watch(ONE, "", Revision(1));
        lab.run(SECOND);
        let lost = lab.send(TWO, Request::Txn(Txn::new().put("c", "")));
        lab.etcd.restore(lab.now_ns, &backup, after);
        let outputs = lab.run(6 * SECOND);
        assert_eq!(end_of_watch(&outputs, ONE), Some(WatchEnd::Lost));
        let result = Err(Error::Unknown);
        assert!(outputs.contains(&Output::Answer { client: TWO, request: lost, result }));
        assert_eq!(lab.etcd.peek("a").map(|kv| kv.value), Some(b"old".to_vec()));
        assert!(lab.etcd.peek("b").is_none() && lab.etcd.peek("c").is_none());
        assert!(lab.etcd.peek("node").is_none(), "leases begin anew and run out");
        let revision = lab.put("b", "again");
        assert_eq!(revision.0 > 1000, after != AfterRestore::AsSaved);
        assert!(lab.lease(SECOND) > lease);
        lab.watch(ONE, "", Revision(2));
        assert_eq!(end_of_watch(&lab.run(SECOND), ONE).map(|end| end != WatchEnd::Lost), Some(true));
    }
}

#[test]
fn a_client_that_ended_hears_nothing_of_its_former_life() {
    let mut lab = Lab::new(1);
    lab.watch(ONE, "", Revision(1));
    lab.send(ONE, Request::Txn(Txn::new().put("a", "")));
    lab.etcd.client_ended(ONE);
    assert_eq!(lab.run(20 * SECOND), []);
    assert!(lab.etcd.peek("a").is_some(), "it was under way");
    assert!(lab.ask(ONE, Request::Get { key: "a".into() }).is_ok());
}

#[test]
fn a_paused_client_hears_later_what_came_meanwhile() {
    let mut lab = Lab::new(1);
    lab.watch(ONE, "", Revision(1));
    let get = lab.send(ONE, Request::Get { key: "a".into() });
    lab.etcd.pause(ONE);
    lab.etcd.apply(0, Txn::new().put("a", "")).unwrap();
    assert_eq!(lab.run(30 * SECOND), []);
    lab.etcd.resume(lab.now_ns, ONE);
    let outputs = lab.run(SECOND);
    assert!(matches!(&outputs[0], Output::Answer { request, result: Ok(_), .. } if *request == get));
    assert_eq!(seen(&outputs, ONE).len(), 1);
}

#[test]
fn every_request_has_one_answer_whatever_happens_and_unavailable_means_not_applied() {
    let mut kinds = BTreeMap::new();
    for seed in 0..100 {
        let mut lab = Lab::new(seed);
        let mut random = Random::new(seed);
        lab.etcd.set_quality(ONE, Quality::drawn(&mut random));
        let mut open: BTreeMap<RequestId, String> = BTreeMap::new();
        let mut unavailable = Vec::new();
        let mut watching = false;
        let mut backups = 0;
        for number in 0..200 {
            match random.below(12) {
                0 => lab.etcd.set_reachable(lab.now_ns, ONE, random.coin()),
                1 => lab.etcd.set_available(lab.now_ns, random.coin()),
                2 => lab.etcd.pause(ONE),
                3 => lab.etcd.resume(lab.now_ns, ONE),
                4 if random.one_in(10) => {
                    backups += 1;
                    let backup = lab.etcd.backup();
                    lab.etcd.restore(lab.now_ns, &backup, AfterRestore::Higher(number % 2));
                }
                5 if !watching => {
                    watching = true;
                    let from = lab.etcd.revision();
                    let id = lab.send(ONE, Request::Watch { watch: WATCH, prefix: String::new(), from });
                    open.insert(id, String::new());
                }
                _ => {
                    let key = format!("k{number}");
                    let id = lab.send(ONE, Request::Txn(Txn::new().put(key.as_str(), "")));
                    open.insert(id, key);
                }
            }
            let mut outputs = lab.run(random.magnitude(1_000..2 * SECOND));
            if number == 199 {
                lab.etcd.heal(lab.now_ns);
                lab.etcd.resume(lab.now_ns, ONE);
                outputs.extend(lab.run(60 * SECOND));
            }
            for output in outputs {
                match output {
                    Output::Answer { request, result, .. } => {
                        let key = open.remove(&request).expect("one answer");
                        watching &= !(key.is_empty() && result.is_err());
                        *kinds.entry(format!("{:?}", result.as_ref().err())).or_insert(0) += 1;
                        if result == Err(Error::Unavailable) && !key.is_empty() {
                            unavailable.push(key);
                        }
                    }
                    Output::WatchEnded { .. } => {
                        assert!(std::mem::replace(&mut watching, false), "seed {seed}: it was not known");
                    }
                    Output::Changes { .. } => assert!(watching),
                }
            }
        }
        assert!(open.is_empty(), "seed {seed}: {open:?}");
        assert!(unavailable.iter().all(|key| lab.etcd.peek(key).is_none()), "seed {seed} {backups}");
        if watching {
            lab.etcd.apply(lab.now_ns, Txn::new().put("last", "")).unwrap();
            assert_eq!(seen(&lab.run(SECOND), ONE).len(), 1, "seed {seed}: a watch never goes silent");
        }
        assert_eq!(lab.etcd.next_ns(), None, "seed {seed}");
    }
    assert!(kinds.len() >= 3 && kinds.values().all(|count| *count > 100), "{kinds:?}");
}
