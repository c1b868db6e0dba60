//! What a node knows of the cluster: one consistent [`View`] of the reflected metadata, kept by following its changes.
//!
//! A change costs what it changes, not what the cluster holds: a view that has been given out is never touched, but two or
//! three copies of it take turns. The next view is made of a former one that nobody looks at any more, by applying what
//! came since; only while all of them are looked at is one copied whole.
//!
//! A record that cannot be read spoils the view: the last good one stays, beside the problem, until all can be read again.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::SystemTime;

use tokio::sync::watch;

use crate::meta::reflector::Follow;
use crate::meta::{Event, KeyValue, Revision};
use crate::model::{ModelError, View};
use crate::node::{rfc3339, unix_s};

/// Former views that are kept to be made into coming ones.
const FORMER: usize = 2;
/// Batches of changes after which a former view that is still looked at is given up.
const BATCHES_BEHIND: usize = 64;

/// The cluster as this node knows it.
#[derive(Debug, Clone)]
pub struct Known {
    /// The last view that could be read.
    pub view: Arc<View>,
    /// Its revision; 0 before the first.
    pub revision: Revision,
    /// Whether changes are being followed.
    pub connected: bool,
    /// Since when they are, or are not.
    pub since_unix_s: u64,
    /// Why the node acts on nothing new; empty if it does.
    pub problem: String,
}

impl Known {
    fn nothing() -> Self {
        Self {
            view: Arc::default(),
            revision: Revision(0),
            connected: false,
            since_unix_s: unix_s(SystemTime::now()),
            problem: String::new(),
        }
    }

    /// Whether there is a view at all.
    #[must_use]
    pub fn listed(&self) -> bool {
        self.revision > Revision(0)
    }

    /// Whether it may be acted on.
    #[must_use]
    pub fn usable(&self) -> bool {
        self.listed() && self.problem.is_empty()
    }

    /// `connected` or `disconnected since …`.
    #[must_use]
    pub fn words(&self) -> String {
        if self.connected {
            "connected".into()
        } else {
            format!("disconnected since {}", rfc3339(self.since_unix_s))
        }
    }
}

/// The newest view, and former ones to make the coming ones of.
#[derive(Default)]
struct Copies {
    newest: Arc<View>,
    former: VecDeque<Former>,
}

/// A view that was the newest once, and all that came since.
struct Former {
    view: Arc<View>,
    since: Vec<Arc<[Event]>>,
}

impl Copies {
    /// Makes the next view; what `told` gets is what became of each of the events.
    fn advance(&mut self, events: Vec<Event>, mut told: impl FnMut(&Event, Result<(), ModelError>)) {
        let events: Arc<[Event]> = events.into();
        self.former.iter_mut().for_each(|former| former.since.push(Arc::clone(&events)));
        let free = self.former.iter_mut().rposition(|former| Arc::get_mut(&mut former.view).is_some());
        let mut next = match free.and_then(|index| self.former.remove(index)) {
            Some(former) => former,
            None => Former { view: Arc::new(View::clone(&self.newest)), since: vec![Arc::clone(&events)] },
        };
        let view = Arc::make_mut(&mut next.view);
        let (last, before) =
            next.since.split_last().map_or((&[][..], &[][..]), |(last, before)| (last, before));
        // What came before was told when it came.
        for event in before.iter().flat_map(|batch| batch.iter()) {
            let _ = view.follow(event);
        }
        last.iter().for_each(|event| told(event, view.follow(event)));
        let former = std::mem::replace(&mut self.newest, next.view);
        self.former.retain(|former| former.since.len() < BATCHES_BEHIND);
        self.former.push_back(Former { view: former, since: vec![events] });
        while self.former.len() > FORMER {
            self.former.pop_front();
        }
    }
}

/// Follows the metadata and publishes what is known.
pub(crate) struct Knowledge {
    known: Known,
    copies: Copies,
    /// Records that cannot be read, by key.
    damaged: BTreeMap<String, ModelError>,
    rewound: bool,
    publish: watch::Sender<Arc<Known>>,
}

impl Knowledge {
    pub(crate) fn new() -> (Self, watch::Receiver<Arc<Known>>) {
        let known = Known::nothing();
        let (publish, receiver) = watch::channel(Arc::new(known.clone()));
        let (copies, damaged) = (Copies::default(), BTreeMap::new());
        (Self { known, copies, damaged, rewound: false, publish }, receiver)
    }

    /// Publishes the view as it is at a revision.
    fn know(&mut self, revision: Revision) {
        if self.rewound {
            // Acting on an older state could undo what was acknowledged since (I14).
            self.known.problem =
                "the metadata store went back in time (a restored backup?): nothing is changed; \
                                  check it, then restart torusd to go on with the older state"
                    .into();
        } else {
            self.known.revision = self.known.revision.max(revision);
            match self.damaged.values().next() {
                Some(error) => self.known.problem = error.to_string(),
                None => {
                    self.known.view = Arc::clone(&self.copies.newest);
                    self.known.problem.clear();
                }
            }
        }
        self.publish();
    }

    fn publish(&self) {
        self.publish.send_replace(Arc::new(self.known.clone()));
    }
}

impl Follow for Knowledge {
    fn listed(&mut self, revision: Revision, entries: Vec<KeyValue>) {
        self.rewound |= revision < self.known.revision;
        let mut view = View::default();
        self.damaged.clear();
        for entry in entries {
            if let Err(error) = view.add(&entry) {
                self.damaged.insert(entry.key, error);
            }
        }
        self.copies = Copies { newest: Arc::new(view), former: VecDeque::new() };
        self.know(revision);
    }

    fn changed(&mut self, revision: Revision, events: Vec<Event>) {
        let damaged = &mut self.damaged;
        self.copies.advance(events, |event, followed| {
            let error = followed.err().filter(|_| matches!(event, Event::Put(_)));
            match error {
                Some(error) => drop(damaged.insert(event.key().to_owned(), error)),
                None => drop(damaged.remove(event.key())),
            }
        });
        self.know(revision);
    }

    fn connected(&mut self) {
        self.known.connected = true;
        self.known.since_unix_s = unix_s(SystemTime::now());
        self.publish();
    }

    fn disconnected(&mut self, _: &str) {
        if std::mem::replace(&mut self.known.connected, false) {
            self.known.since_unix_s = unix_s(SystemTime::now());
        }
        self.publish();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{NameRecord, encode, keys};
    use cluster_map::VolumeId;
    use proptest::prelude::*;

    fn put(name: &str, id: u8, revision: i64) -> Event {
        let value = encode(&NameRecord { volume: VolumeId([id; 16]) });
        Event::Put(KeyValue { key: keys::name(name), value, mod_revision: Revision(revision), lease: None })
    }

    fn names(known: &Known) -> Vec<String> {
        known.view.names.keys().cloned().collect()
    }

    #[test]
    fn a_view_that_nobody_looks_at_is_made_into_the_next_but_one() {
        let (mut knowledge, receiver) = Knowledge::new();
        knowledge.listed(Revision(1), Vec::new());
        let place = |receiver: &watch::Receiver<Arc<Known>>| Arc::as_ptr(&receiver.borrow().view);
        let mut places = Vec::new();
        for revision in 2..12 {
            knowledge.changed(Revision(revision), vec![put(&revision.to_string(), 1, revision)]);
            places.push(place(&receiver));
        }
        places.sort_unstable();
        places.dedup();
        assert!(places.len() <= 1 + FORMER, "copies take turns");
        assert_eq!(receiver.borrow().view.names.len(), 10);
    }

    #[test]
    fn a_record_that_cannot_be_read_keeps_the_last_good_view_until_all_can() {
        let (mut knowledge, receiver) = Knowledge::new();
        knowledge.listed(Revision(1), Vec::new());
        knowledge.changed(Revision(2), vec![put("a", 1, 2)]);
        let bad = |key: String, revision| {
            Event::Put(KeyValue { key, value: b"?".to_vec(), mod_revision: Revision(revision), lease: None })
        };
        knowledge
            .changed(Revision(3), vec![bad(keys::name("b"), 3), bad("torus/volumes/nonsense".into(), 3)]);
        knowledge.changed(Revision(4), vec![put("c", 1, 4)]);
        let known = || Arc::clone(&receiver.borrow());
        assert_eq!((names(&known()), known().revision), (vec!["a".to_owned()], Revision(4)));
        assert!(!known().usable() && known().problem.contains("torus/names/b"));
        knowledge.changed(Revision(5), vec![put("b", 1, 5)]);
        assert!(known().problem.contains("nonsense"));
        let gone = Event::Delete { key: "torus/volumes/nonsense".into(), revision: Revision(6) };
        knowledge.changed(Revision(6), vec![gone]);
        assert!(known().usable());
        assert_eq!(names(&known()), ["a", "b", "c"]);
        knowledge.listed(Revision(5), Vec::new());
        assert!(!known().usable() && known().problem.contains("back in time"));
        assert_eq!(names(&known()), ["a", "b", "c"]);
    }

    proptest! {
        /// However long readers hold views: each view stays what it was, and the newest is exact.
        #[test]
        fn views_are_exact_and_never_touched_while_looked_at(
            steps in proptest::collection::vec((0u8..6, 0u8..4, 0usize..5), 1..120),
        ) {
            let (mut knowledge, receiver) = Knowledge::new();
            knowledge.listed(Revision(1), Vec::new());
            let mut entries = BTreeMap::new();
            let mut held: Vec<(Arc<View>, View)> = Vec::new();
            for (revision, (name, id, keep)) in (2..).zip(steps) {
                let name = name.to_string();
                let event = if id == 0 {
                    entries.remove(&keys::name(&name));
                    Event::Delete { key: keys::name(&name), revision: Revision(revision) }
                } else {
                    put(&name, id, revision)
                };
                if let Event::Put(entry) = &event {
                    entries.insert(entry.key.clone(), entry.clone());
                }
                knowledge.changed(Revision(revision), vec![event]);
                let known = Arc::clone(&receiver.borrow());
                prop_assert_eq!(known.view.as_ref(), &View::read(entries.values()).unwrap());
                held.push((Arc::clone(&known.view), View::clone(&known.view)));
                prop_assert!(held.iter().all(|(view, copy)| view.as_ref() == copy));
                let drop_from = held.len().saturating_sub(keep);
                held.drain(..drop_from);
            }
        }
    }
}
