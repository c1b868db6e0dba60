//! A node's control process: what `torusd` decides, by its own functions, with the waiting done by the schedule.
//!
//! Like the real one it is several parts, none of which waits for another: one follows the metadata, by list and watch; one keeps the
//! lease with the node's sign of life and status (`session`); one publishes the desired state and has changes made (`following`); one
//! starts the data plane (`supervising`). It ends and starts apart from the data plane; what it knows is read anew then, and what it
//! published stays in the map.

mod following;
mod leaving;
mod session;
mod supervising;

use std::collections::BTreeMap;
use std::time::Duration;

use torus_control::decisions::Decisions;
use torus_control::meta::{Event as Change, Revision};
use torus_control::model::{PREFIX, View};

use self::following::UnderWay;
use self::leaving::Leaving;
use self::session::Session;
use self::supervising::Supervisor;
use super::metadata::of_etcd;
use super::{Event, World, node_id};
use crate::etcd::{self, ClientId, Output, Reply, Request, RequestId, WatchId};

/// How soon what failed to be followed is tried again: at first, and at most.
const BACKOFF_NS: (u64, u64) = (50_000_000, 2_000_000_000);

/// What a request was for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Asked {
    /// The whole of the metadata.
    List,
    /// Its changes.
    Watch(WatchId),
    /// Part of the session.
    Session,
    /// A change, or what it depends on.
    Change,
    /// That a head go elsewhere, before the node stops.
    Leaving,
}

/// How far the metadata is followed.
#[derive(Debug)]
enum Following {
    /// Not; it is tried again then.
    Not { retry_ns: u64 },
    /// It was listed, or asked to be.
    Asked,
    /// By that watch.
    By(WatchId),
}

/// What of a node ends with its control process.
#[derive(Debug)]
pub(super) struct Control {
    /// Which one of the node's.
    life: u64,
    started_boot_ns: u64,
    wake_ns: u64,
    is_paused: bool,
    asked: BTreeMap<RequestId, Asked>,
    following: Following,
    followed_ns: u64,
    backoff_ns: u64,
    view: View,
    revision: Revision,
    session: Session,
    decisions: Decisions,
    under_way: Option<UnderWay>,
    look_ns: u64,
    supervisor: Supervisor,
    leaving: Option<Leaving>,
}

impl Control {
    fn new(node: usize, life: u64, boot_ns: u64) -> Control {
        Control {
            life,
            started_boot_ns: boot_ns,
            wake_ns: u64::MAX,
            is_paused: false,
            asked: BTreeMap::new(),
            following: Following::Not { retry_ns: 0 },
            followed_ns: 0,
            backoff_ns: BACKOFF_NS.0,
            view: View::default(),
            revision: Revision(0),
            session: Session::default(),
            decisions: Decisions::new(node_id(node)),
            under_way: None,
            look_ns: 0,
            supervisor: Supervisor::default(),
            leaving: None,
        }
    }

    pub(super) fn is_paused(&self) -> bool {
        self.is_paused
    }

    /// Whether there is anything to act on.
    fn has_listed(&self) -> bool {
        self.revision > Revision(0)
    }

    fn is_connected(&self) -> bool {
        matches!(self.following, Following::By(_))
    }

    /// Time since it started, by the node's clock.
    fn elapsed(&self, boot_ns: u64) -> Duration {
        Duration::from_nanos(boot_ns.saturating_sub(self.started_boot_ns))
    }
}

impl World {
    /// Starts a node's control process, unless there is one.
    pub(super) fn start_control(&mut self, node: usize) {
        let boot_ns = self.boot_ns(node);
        let at = &mut self.nodes[node];
        if at.control.is_some() {
            return;
        }
        at.control_life += 1;
        at.control = Some(Control::new(node, at.control_life, boot_ns));
        self.note(|| format!("node {node}: its control process starts"));
        self.wake_control(node, 1_000_000..20_000_000);
    }

    /// Ends it. What it has asked of etcd may be carried out still.
    pub(super) fn end_control(&mut self, node: usize) {
        if self.nodes[node].control.take().is_some() {
            self.metadata.etcd.client_ended(ClientId(node));
            self.note(|| format!("node {node}: its control process ends"));
        }
    }

    pub(super) fn pause_control(&mut self, node: usize, is_paused: bool) {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return };
        if std::mem::replace(&mut control.is_paused, is_paused) == is_paused {
            return;
        }
        if is_paused {
            self.metadata.etcd.pause(ClientId(node));
        } else {
            self.metadata.etcd.resume(now_ns, ClientId(node));
            self.control_by(node, now_ns);
        }
    }

    /// Has a node's control process look around at that time, if it would not before.
    fn control_by(&mut self, node: usize, at_ns: u64) {
        let Some(control) = &mut self.nodes[node].control else { return };
        let at_ns = at_ns.max(self.schedule.now_ns());
        if at_ns < control.wake_ns {
            control.wake_ns = at_ns;
            self.schedule.at(at_ns, Event::Control { node, life: control.life });
        }
    }

    fn wake_control(&mut self, node: usize, within_ns: std::ops::Range<u64>) {
        let at_ns = self.now_ns() + self.nodes[node].random.range(within_ns);
        self.control_by(node, at_ns);
    }

    /// Has it look at the map, or at what it knows, then.
    pub(super) fn look_by(&mut self, node: usize, at_ns: u64) {
        let Some(control) = &mut self.nodes[node].control else { return };
        control.look_ns = control.look_ns.min(at_ns);
        self.control_by(node, at_ns);
    }

    /// A node's control process looks around.
    pub(super) fn control_turn(&mut self, node: usize, life: u64) {
        let now_ns = self.now_ns();
        let Some(control) = self.nodes[node].control.as_mut().filter(|control| control.life == life) else {
            return;
        };
        if now_ns < control.wake_ns {
            return;
        }
        control.wake_ns = u64::MAX;
        if control.is_paused {
            return;
        }
        self.reflect(node);
        let session_ns = self.keep_session(node);
        let start_ns = self.supervise(node);
        let look_ns = self.follow(node).min(self.go_on_leaving(node));
        let Some(control) = &self.nodes[node].control else { return };
        let retry_ns = if let Following::Not { retry_ns } = control.following { retry_ns } else { u64::MAX };
        let due_ns = session_ns.min(start_ns).min(look_ns).min(retry_ns);
        if due_ns < u64::MAX {
            self.control_by(node, due_ns);
        }
    }

    /// Asks etcd for something.
    fn ask_etcd(&mut self, node: usize, asked: Asked, request: Request) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        let Some(control) = &mut at.control else { return };
        at.requests += 1;
        let id = RequestId(at.requests);
        control.asked.insert(id, asked);
        self.metadata.etcd.request(now_ns, ClientId(node), id, request);
    }

    /// Lists, if it is time to.
    fn reflect(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let Some(control) = &mut self.nodes[node].control else { return };
        if let Following::Not { retry_ns } = control.following
            && now_ns >= retry_ns
        {
            control.following = Following::Asked;
            control.followed_ns = now_ns;
            self.ask_etcd(node, Asked::List, Request::List { prefix: PREFIX.into() });
        }
    }

    /// The metadata is not followed any more.
    fn lose_metadata(&mut self, node: usize) {
        let now_ns = self.now_ns();
        let at = &mut self.nodes[node];
        let Some(control) = &mut at.control else { return };
        if now_ns.saturating_sub(control.followed_ns) > BACKOFF_NS.1 {
            control.backoff_ns = BACKOFF_NS.0;
        }
        let wait_ns = at.random.range(control.backoff_ns / 2..control.backoff_ns);
        control.backoff_ns = (control.backoff_ns * 2).min(BACKOFF_NS.1);
        control.following = Following::Not { retry_ns: now_ns + wait_ns };
        self.control_by(node, now_ns + wait_ns);
    }

    /// Something comes from etcd.
    pub(super) fn etcd_says(&mut self, output: Output) {
        let node = output.client().0;
        let now_ns = self.now_ns();
        if node >= self.plan.nodes || self.nodes[node].control.is_none() {
            return;
        }
        match output {
            Output::Answer { request, result, .. } => self.etcd_answers(node, request, result),
            Output::Changes { watch, events, .. } => {
                let Some(control) = &mut self.nodes[node].control else { return };
                if !matches!(control.following, Following::By(by) if by == watch) {
                    return;
                }
                for event in events {
                    control.revision = Revision(event.revision().0);
                    let event = match event {
                        etcd::Event::Put(entry) => Change::Put(of_etcd(entry)),
                        etcd::Event::Delete { key, revision } => {
                            Change::Delete { key, revision: Revision(revision.0) }
                        }
                    };
                    control.view.follow(&event).expect("what is written can be read");
                }
            }
            Output::WatchEnded { watch, end, .. } => {
                let control = self.nodes[node].control.as_ref();
                if control
                    .is_some_and(|control| matches!(control.following, Following::By(by) if by == watch))
                {
                    self.note(|| format!("node {node}: its watch ends: {end:?}"));
                    self.lose_metadata(node);
                }
            }
        }
        self.look_by(node, now_ns);
    }

    fn etcd_answers(&mut self, node: usize, request: RequestId, result: Result<Reply, etcd::Error>) {
        let Some(control) = &mut self.nodes[node].control else { return };
        let Some(asked) = control.asked.remove(&request) else { return };
        if result == Err(etcd::Error::Unknown) {
            self.coverage.doubts += 1;
        }
        match (asked, result) {
            (Asked::List, Ok(Reply::Snapshot(snapshot))) => {
                let entries: Vec<_> = snapshot.entries.into_iter().map(of_etcd).collect();
                control.view = View::read(&entries).expect("what is written can be read");
                control.revision = Revision(snapshot.revision.0);
                self.nodes[node].watches += 1;
                let watch = WatchId(self.nodes[node].watches);
                let from = snapshot.revision.next();
                let request = Request::Watch { watch, prefix: PREFIX.into(), from };
                self.ask_etcd(node, Asked::Watch(watch), request);
            }
            (Asked::Watch(watch), Ok(_)) => control.following = Following::By(watch),
            (Asked::List | Asked::Watch(_), _) => self.lose_metadata(node),
            (Asked::Session, result) => self.session_hears(node, result),
            (Asked::Change, result) => self.change_hears(node, result),
            (Asked::Leaving, result) => self.leaving_hears(node, result.is_ok()),
        }
    }
}
