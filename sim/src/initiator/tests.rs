use super::*;

const ADDRESS: Address = Address { shelf: 1, slot: 2 };
const HEAD: Mac = Mac(0x0200);
const MILLI: u64 = 1_000_000;
const SECOND: u64 = 1_000_000_000;

struct Lab {
    initiator: Initiator,
    now_ns: u64,
}

impl Lab {
    fn new(interfaces: usize) -> Self {
        let setup = Setup::new(3, ADDRESS, 1024, interfaces);
        let mut lab = Self { initiator: Initiator::new(0, setup, Random::new(1)), now_ns: 0 };
        let asked = lab.run(0);
        assert_eq!(asked.len(), interfaces);
        assert!(asked.iter().all(|output| matches!(
            output,
            Output::Transmit {
                destination: Mac::BROADCAST,
                request: Request { command: Command::Query, .. },
                ..
            }
        )));
        lab
    }

    fn met(interfaces: usize) -> Self {
        let mut lab = Self::new(interfaces);
        for interface in 0..interfaces {
            lab.advertise(interface, HEAD);
        }
        lab
    }

    fn advertise(&mut self, interface: usize, mac: Mac) {
        let answer = Answer::Config { buffers: 64, sectors: 16 };
        let response = Response { address: ADDRESS, tag: Tag(0), answer };
        self.initiator.receive(self.now_ns, interface, mac, &response);
    }

    /// Lets time pass, and gives what the initiator did.
    fn run(&mut self, by_ns: u64) -> Vec<Output> {
        let limit_ns = self.now_ns + by_ns;
        while self.initiator.next_ns() <= limit_ns {
            self.now_ns = self.initiator.next_ns().max(self.now_ns);
            self.initiator.advance(self.now_ns);
        }
        self.now_ns = limit_ns;
        std::iter::from_fn(|| self.initiator.pop()).collect()
    }

    fn answer(&mut self, tag: Tag, answer: Answer) -> Vec<Output> {
        let response = Response { address: ADDRESS, tag, answer };
        self.initiator.receive(self.now_ns, 0, HEAD, &response);
        std::iter::from_fn(|| self.initiator.pop()).collect()
    }

    /// Many quick operations: the time for retransmission becomes short.
    fn warm_up(&mut self) {
        for _ in 0..3000 {
            self.initiator.submit(self.now_ns, 0, Action::Read(1));
            let frames = frames(&self.run(MILLI / 10));
            self.answer(frames[0].2.tag, Answer::Read([0].into()));
        }
        assert!(self.initiator.retransmission_ns() < MILLI);
    }
}

fn frames(outputs: &[Output]) -> Vec<(usize, Mac, Request)> {
    let frames = outputs.iter().filter_map(|output| match output {
        Output::Transmit { interface, destination, request } if request.command != Command::Query => {
            Some((*interface, *destination, request.clone()))
        }
        _ => None,
    });
    frames.collect()
}

fn ends(outputs: &[Output]) -> Vec<(OpId, Outcome)> {
    let ends = outputs.iter().filter_map(|output| match output {
        Output::Ended { op, outcome } => Some((*op, outcome.clone())),
        _ => None,
    });
    ends.collect()
}

#[test]
fn an_operation_is_cut_into_frames_and_ends_with_the_last_answer() {
    let mut lab = Lab::met(1);
    let write = lab.initiator.submit_write(0, 100, 40);
    let outputs = lab.run(0);
    assert!(matches!(&outputs[0], Output::Begun { op, lba: 100, .. } if *op == write));
    let sent = frames(&outputs);
    let cuts: Vec<(u64, usize)> = sent
        .iter()
        .map(|(_, _, request)| match &request.command {
            Command::Write { lba, values } => (*lba, values.len()),
            other => panic!("{other:?}"),
        })
        .collect();
    assert_eq!(cuts, [(100, 16), (116, 16), (132, 8)]);
    assert!(ends(&lab.answer(sent[2].2.tag, Answer::Written)).is_empty());
    assert!(ends(&lab.answer(sent[0].2.tag, Answer::Written)).is_empty());
    assert!(ends(&lab.answer(sent[0].2.tag, Answer::Written)).is_empty(), "a tag is answered once");
    assert_eq!(ends(&lab.answer(sent[1].2.tag, Answer::Written)), [(write, Outcome::Written)]);
    let read = lab.initiator.submit(0, 10, Action::Read(17));
    let sent = frames(&lab.run(0));
    lab.answer(sent[1].2.tag, Answer::Read([7].into()));
    let ended = ends(&lab.answer(sent[0].2.tag, Answer::Read((0..16).collect())));
    let expected: Vec<u64> = (0..16).chain([7]).collect();
    assert_eq!(ended, [(read, Outcome::Read(expected))]);
    assert!(lab.initiator.is_idle() && lab.initiator.owns(read));
}

#[test]
fn values_are_never_used_twice() {
    let mut lab = Lab::met(1);
    lab.initiator.set_load(0, Some(Load { depth: 64, ..Load::new(1024) }));
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..500 {
        for output in lab.run(10 * MILLI) {
            match output {
                Output::Begun { action: Action::Write(values), .. } => {
                    assert!(values.into_iter().all(|value| value != 0 && seen.insert(value)));
                }
                Output::Transmit { request, .. } => {
                    let answer = match &request.command {
                        Command::Read { count, .. } => Answer::Read(vec![0; *count].into()),
                        _ => Answer::Written,
                    };
                    let response = Response { address: ADDRESS, tag: request.tag, answer };
                    lab.initiator.receive(lab.now_ns, 0, HEAD, &response);
                }
                _ => {}
            }
        }
    }
    assert!(seen.len() > 1000, "{}", seen.len());
}

#[test]
fn a_load_writes_nothing_twice_at_a_time_unless_it_is_to() {
    let overlaps = |overlapping_writes: bool| {
        let mut lab = Lab::met(1);
        let load = Load { depth: 32, overlapping_writes, ..Load::new(64) };
        lab.initiator.set_load(0, Some(Load { writes: vec![8..24, 40..48], ..load }));
        let mut written = Vec::new();
        for output in lab.run(SECOND) {
            if let Output::Begun { lba, action: Action::Write(values), .. } = output {
                written.extend(lba..lba + values.len() as u64);
            }
        }
        assert!(written.iter().all(|lba| (8..24).contains(lba) || (40..48).contains(lba)));
        let all = written.len();
        written.sort_unstable();
        written.dedup();
        (all > written.len(), all)
    };
    let (any, all) = overlaps(false);
    assert!(!any && all > 10);
    assert!(overlaps(true).0);
}

#[test]
fn a_retransmission_has_a_new_tag_and_goes_to_the_same_address() {
    let mut lab = Lab::met(1);
    lab.warm_up();
    let write = lab.initiator.submit_write(lab.now_ns, 0, 1);
    let first = frames(&lab.run(0)).remove(0);
    let again = frames(&lab.run(100 * MILLI)).remove(0);
    assert_eq!((first.1, &first.2.command), (again.1, &again.2.command));
    assert_ne!(first.2.tag, again.2.tag);
    assert!(again.2.tag.0 >> 16 > first.2.tag.0 >> 16, "sequences grow");
    // The first copy is answered late: measured, and for nothing.
    assert!(ends(&lab.answer(first.2.tag, Answer::Written)).is_empty());
    assert_eq!(lab.initiator.counters().unexpected, 1);
    assert!(lab.initiator.retransmission_ns() > MILLI, "{}", lab.initiator.retransmission_ns());
    assert_eq!(ends(&lab.answer(again.2.tag, Answer::Written)), [(write, Outcome::Written)]);
}

#[test]
fn a_loss_collapses_the_window_and_answers_open_it_again() {
    let mut lab = Lab::met(1);
    lab.warm_up();
    lab.initiator.submit(lab.now_ns, 0, Action::Read(1024));
    assert_eq!(frames(&lab.run(0)).len(), 32, "half of the window to begin with");
    let again = frames(&lab.run(100 * MILLI));
    assert_eq!(again.len(), 1, "one at a time");
    let mut out: VecDeque<Tag> = [again[0].2.tag].into();
    let mut most = 1;
    let mut rounds = 0;
    while let Some(tag) = out.pop_front() {
        lab.run(0);
        let sent = frames(&lab.answer(tag, Answer::Read(vec![0; 16].into())));
        out.extend(sent.iter().map(|(_, _, request)| request.tag));
        most = most.max(out.len());
        rounds += 1;
    }
    assert!(lab.initiator.is_idle());
    assert_eq!(rounds, 64);
    assert!((10..=20).contains(&most), "{most}");
}

#[test]
fn interfaces_take_turns_also_at_retransmission() {
    let mut lab = Lab::met(2);
    lab.warm_up();
    lab.initiator.submit(lab.now_ns, 0, Action::Read(64));
    let by: Vec<usize> = frames(&lab.run(0)).iter().map(|(interface, ..)| *interface).collect();
    assert_eq!(by.iter().filter(|interface| **interface == 0).count(), 2);
    let mut again = std::collections::BTreeSet::new();
    for _ in 0..4 {
        again.extend(frames(&lab.run(100 * MILLI)).iter().map(|(interface, ..)| *interface));
    }
    assert_eq!(again.len(), 2);
}

#[test]
fn an_address_is_left_only_after_ten_silent_seconds() {
    let mut lab = Lab::met(1);
    lab.warm_up();
    let read = lab.initiator.submit(lab.now_ns, 0, Action::Read(1));
    lab.run(0);
    let other = Mac(0x0300);
    lab.advertise(0, other);
    let mut sent_to = BTreeMap::new();
    let mut tag = None;
    for _ in 0..150 {
        for (_, mac, request) in frames(&lab.run(100 * MILLI)) {
            sent_to.entry(mac).or_insert(lab.now_ns);
            if mac == other {
                tag = Some(request.tag);
            }
        }
        if let Some(tag) = tag.take() {
            assert_eq!(ends(&lab.answer(tag, Answer::Read([0].into())))[0].0, read);
            break;
        }
    }
    let waited_ns = sent_to[&other] - sent_to[&HEAD];
    assert!((9 * SECOND..11 * SECOND).contains(&waited_ns), "{waited_ns}");
    assert!(lab.initiator.counters().reassigned >= 1);
    // New operations avoid the silent one, which is probed.
    lab.run(0);
    lab.initiator.submit(lab.now_ns, 0, Action::Read(64));
    let targets: Vec<Mac> = frames(&lab.run(0)).iter().map(|(_, mac, _)| *mac).collect();
    assert!(!targets.is_empty() && targets.iter().all(|mac| *mac == other), "{targets:?}");
}

#[test]
fn a_silent_device_is_given_up_and_comes_back_with_an_answer_to_a_query() {
    let mut lab = Lab::met(1);
    let write = lab.initiator.submit_write(0, 0, 1);
    let outputs = lab.run(170 * SECOND);
    assert!(ends(&outputs).is_empty() && frames(&outputs).len() > 5);
    assert_eq!(ends(&lab.run(30 * SECOND)), [(write, Outcome::Failed)]);
    assert!(!lab.initiator.is_up());
    let refused = lab.initiator.submit(lab.now_ns, 0, Action::Read(1));
    assert_eq!(ends(&lab.run(0)), [(refused, Outcome::Failed)]);
    lab.advertise(0, HEAD);
    assert!(lab.initiator.is_up());
    lab.initiator.submit(lab.now_ns, 0, Action::Read(1));
    assert_eq!(frames(&lab.run(0)).len(), 1);
}

#[test]
fn an_error_ends_an_operation_and_other_devices_are_not_listened_to() {
    let mut lab = Lab::met(1);
    let read = lab.initiator.submit(0, 0, Action::Read(1));
    let sent = frames(&lab.run(0));
    let foreign = Address { shelf: 9, slot: 9 };
    let response = Response { address: foreign, tag: sent[0].2.tag, answer: Answer::Failed };
    lab.initiator.receive(0, 0, HEAD, &response);
    assert!(lab.run(0).is_empty());
    assert_eq!(ends(&lab.answer(sent[0].2.tag, Answer::Failed)), [(read, Outcome::Failed)]);
    let read = lab.initiator.submit(0, 0, Action::Read(4));
    let sent = frames(&lab.run(0));
    let short = Answer::Read([1, 2].into());
    assert_eq!(ends(&lab.answer(sent[0].2.tag, short)), [(read, Outcome::Failed)]);
}

#[test]
fn the_whole_device_can_be_read() {
    let mut lab = Lab::met(1);
    lab.initiator.submit_sweep(0, 100);
    let mut read = 0;
    let mut outputs = VecDeque::from(lab.run(0));
    while let Some(output) = outputs.pop_front() {
        match output {
            Output::Transmit {
                request: Request { tag, command: Command::Read { count, .. }, .. }, ..
            } => {
                outputs.extend(lab.answer(tag, Answer::Read(vec![0; count].into())));
            }
            Output::Ended { outcome: Outcome::Read(values), .. } => read += values.len(),
            _ => {}
        }
    }
    assert_eq!(read, 1024);
}

#[test]
fn frames_are_as_small_as_the_smallest_target_wants_them() {
    let mut lab = Lab::met(1);
    let small = Answer::Config { buffers: 64, sectors: 2 };
    let response = Response { address: ADDRESS, tag: Tag(0), answer: small };
    lab.initiator.receive(0, 0, Mac(0x0300), &response);
    lab.initiator.submit(0, 0, Action::Read(16));
    let sent = frames(&lab.run(0));
    assert_eq!(sent.len(), 8);
    assert_eq!(sent.iter().filter(|(_, mac, _)| *mac == HEAD).count(), 4, "addresses take turns");
}

#[test]
fn discovery_goes_on() {
    let mut lab = Lab::new(2);
    let queries = lab.run(600 * SECOND).len();
    assert_eq!(queries, 20);
}
