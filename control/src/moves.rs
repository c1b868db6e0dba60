//! Planned moves of heads: a wish in the volume's heads record, which the node that has the head follows.
//!
//! - The data plane of the head ends what is in progress, gives its grants back and says so; its node then names the successor with
//!   the next take-over number, in one transaction, which compares that the successor is alive.
//! - A wish is given up when its successor is not fit any more, or after [`LIMIT`]; the head then goes on by itself.
//! - A head that dies meanwhile is replaced like any other, and the wish ends with it.
//! - A node that is stopped first moves its heads away, but does not wait for that longer than [`LEAVE_LIMIT`].

use std::collections::BTreeMap;
use std::time::Duration;

use cluster_map::{Desired, HeadState, NodeId, Observed, VolumeId};
use tokio::time::Instant;

use crate::heads::HeadsRecord;
use crate::meta::{Compare, Txn, TxnOutcome};
use crate::model::{Entry, View, VolumeState, encode, keys};
use crate::node::Node;
use crate::ops::{Plan, Refusal, RefusalKind};
use crate::takeover::order;

/// How long a wish stands.
pub const LIMIT: Duration = Duration::from_secs(10);
/// How long a node that is stopped waits for its heads to be elsewhere. Heads that simply end are replaced within that time, so that
/// waiting longer would cost more than it saves.
pub const LEAVE_LIMIT: Duration = Duration::from_secs(3);
/// How soon a node that is stopped looks again.
const LOOK_AGAIN: Duration = Duration::from_millis(200);

/// Why a node cannot be the head of a volume now.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Unfit {
    /// It has no copy.
    NoCopy,
    /// Its session is not alive.
    Down,
    /// Its copy misses writes.
    NotInSync,
    /// The store of its copy is not open.
    StoreNotOpen,
    /// Its data plane cannot be head.
    CannotReplicate,
}

/// Whether a node can be the head of a volume now.
///
/// # Errors
/// Why not.
pub fn fitness(view: &View, heads: &HeadsRecord, node: NodeId) -> Result<(), Unfit> {
    if !heads.members.iter().any(|member| member.node == node) {
        return Err(Unfit::NoCopy);
    }
    let status = view.status.get(&node).filter(|_| view.live.contains_key(&node)).ok_or(Unfit::Down)?;
    let mut in_sync = heads.members_in_sync().filter(|member| member.node == node).peekable();
    if in_sync.peek().is_none() {
        return Err(Unfit::NotInSync);
    }
    let is_open = |store, incarnation| {
        let mut stores = status.stores.iter();
        stores.any(|s| s.id == Some(store) && s.state == "ready" && s.incarnation == incarnation)
    };
    if !in_sync.any(|member| is_open(member.store, member.incarnation)) {
        return Err(Unfit::StoreNotOpen);
    }
    if status.replicates { Ok(()) } else { Err(Unfit::CannotReplicate) }
}

/// Wishes that a node, named by its name or id, be the head of a volume. To wish for the node that is head takes a wish back.
///
/// # Errors
/// No such volume or node, one copy only, the head's node is down, or the node cannot be head now.
pub fn move_head(view: &View, name: &str, node: &str) -> Result<Plan<VolumeId>, Refusal> {
    let conflict =
        |code, message: String, hint: String| Refusal::new(RefusalKind::Conflict, code, message, hint);
    let (id, volume) = view.volume(name).ok_or_else(|| Refusal::no_volume(name))?;
    let (to, entry) = view.node(node).ok_or_else(|| Refusal::no_node(node))?;
    let (name, node) = (&volume.record.name, &entry.record.name);
    if volume.record.state == VolumeState::Purging {
        return Err(conflict("purging", format!("volume {name} is being deleted"), String::new()));
    }
    let Some(heads) = view.heads.get(&id) else {
        let message = format!("volume {name} has one copy, which its node serves: there is no head to move");
        let hint = "only volumes with several copies have a head: see `torusctl volume show`";
        return Err(conflict("not_replicated", message, hint.into()));
    };
    let record = &heads.record;
    let move_to = (to != record.head).then_some(to);
    if record.move_to == move_to {
        return Ok(Plan::Done(id));
    }
    if move_to.is_some() {
        if !view.live.contains_key(&record.head) {
            let head = view.node_label(record.head);
            let message =
                format!("node {head}, which is head of volume {name}, is down: it cannot hand over");
            let hint = "a head that is silent is replaced by itself: see `torusctl volume show`";
            return Err(conflict("head_down", message, hint.into()));
        }
        fitness(view, record, to).map_err(|unfit| refusal(unfit, name, node))?;
    }
    let after = HeadsRecord { move_to, ..record.clone() }.following(record, heads.revision);
    let key = keys::heads(id);
    Ok(Plan::Commit(
        Txn::new().when(Compare::Revision(key.clone(), heads.revision)).put(key, encode(&after)),
        id,
    ))
}

fn refusal(unfit: Unfit, volume: &str, node: &str) -> Refusal {
    let (code, message, hint) = match unfit {
        Unfit::NoCopy => (
            "no_copy",
            format!("node {node} has no copy of volume {volume}"),
            format!("name a node that has one: see `torusctl volume show {volume}`"),
        ),
        Unfit::Down => (
            "node_down",
            format!("node {node} is down"),
            "start its torusd, or name another node with a copy in sync".into(),
        ),
        Unfit::NotInSync => (
            "not_in_sync",
            format!("the copy of volume {volume} on node {node} misses writes"),
            format!("wait until it is in sync: see `torusctl volume show {volume}`"),
        ),
        Unfit::StoreNotOpen => (
            "store_not_open",
            format!("the store of node {node} with the copy of volume {volume} is not open"),
            format!("see what is wrong with it: `torusctl node show {node}`"),
        ),
        Unfit::CannotReplicate => (
            "cannot_replicate",
            format!("the data plane of node {node} cannot be head"),
            format!("see `torusctl node show {node}`; it needs --peer-addr and a data plane of this version"),
        ),
    };
    Refusal::new(RefusalKind::Conflict, code, message, hint)
}

/// The moves of the heads that a node has.
#[derive(Debug, Default)]
pub struct Moves {
    /// Since when this node knows of a wish: of which take-over's head, and for whom.
    known: BTreeMap<VolumeId, (u64, NodeId, Duration)>,
}

impl Moves {
    /// What is to be changed now, at a time of a clock that only goes forward. `told` is what stands in the map, and what the running
    /// data plane of the node says.
    pub fn look(
        &mut self,
        view: &View,
        node: NodeId,
        told: Option<(&Desired, &Observed)>,
        now: Duration,
    ) -> Vec<Txn> {
        let wished = view.heads.iter().filter_map(|(id, heads)| {
            let to = heads.record.move_to.filter(|_| heads.record.head == node)?;
            Some((*id, heads, to))
        });
        let mut known = BTreeMap::new();
        let mut steps = Vec::new();
        for (id, heads, to) in wished {
            let before = self
                .known
                .get(&id)
                .filter(|(takeover, who, _)| (*takeover, *who) == (heads.record.takeover, to));
            let since = before.map_or(now, |(.., since)| *since);
            known.insert(id, (heads.record.takeover, to, since));
            let is_over = now.saturating_sub(since) >= LIMIT;
            steps.extend(step(view, id, heads, to, told, is_over));
        }
        self.known = known;
        Txn::together(steps)
    }
}

/// Whether the data plane says that this head has handed over.
fn has_handed_over(id: VolumeId, heads: &HeadsRecord, (published, observed): (&Desired, &Observed)) -> bool {
    observed.heads.iter().any(|head| {
        (head.volume, head.takeover, head.start) == (id, heads.takeover, published.start)
            && head.state == HeadState::HandedOver
    })
}

fn step(
    view: &View,
    id: VolumeId,
    heads: &Entry<HeadsRecord>,
    to: NodeId,
    told: Option<(&Desired, &Observed)>,
    is_over: bool,
) -> Option<Txn> {
    let key = keys::heads(id);
    let mut txn = Txn::new().when(Compare::Revision(key.clone(), heads.revision));
    let after = if fitness(view, &heads.record, to).is_err() || is_over {
        HeadsRecord { move_to: None, ..heads.record.clone() }
    } else if told.is_some_and(|told| has_handed_over(id, &heads.record, told)) {
        txn = txn.when(Compare::Exists(keys::live(to)));
        heads.record.taken_over(to)?
    } else {
        return None;
    };
    Some(txn.put(key, encode(&after.following(&heads.record, heads.revision))))
}

/// Whom the heads of a node that is stopped go to: the wishes that are missing, and how many heads are to go in all.
#[must_use]
pub fn leaving(view: &View, node: NodeId) -> (Vec<Txn>, usize) {
    let own = view.heads.iter().filter(|(id, heads)| {
        let is_purging =
            view.volumes.get(id).is_none_or(|volume| volume.record.state == VolumeState::Purging);
        heads.record.head == node && !is_purging
    });
    let (mut steps, mut going) = (Vec::new(), 0);
    for (id, heads) in own {
        let fit = |other: &NodeId| *other != node && fitness(view, &heads.record, *other).is_ok();
        let nodes = heads.record.members.iter().map(|member| member.node).filter(fit);
        let Some(to) = nodes.min_by_key(|other| (order(*id, *other), *other)) else { continue };
        going += 1;
        if heads.record.move_to.is_none() {
            let after = HeadsRecord { move_to: Some(to), ..heads.record.clone() };
            let (key, after) = (keys::heads(*id), after.following(&heads.record, heads.revision));
            let txn = Txn::new().when(Compare::Revision(key.clone(), heads.revision));
            steps.push(txn.put(key, encode(&after)));
        }
    }
    (Txn::together(steps), going)
}

/// Has other nodes be head of what this one is head of, as far as that can be in time. The node runs on meanwhile.
pub async fn leave(node: &Node) {
    let deadline = Instant::now() + LEAVE_LIMIT;
    let mut changes = node.subscribe();
    let mut moved = 0;
    while Instant::now() < deadline {
        changes.mark_unchanged();
        let known = node.known();
        if !known.usable() || !known.connected {
            break;
        }
        let (txns, going) = leaving(&known.view, node.id);
        drop(known);
        if going == 0 {
            break;
        }
        moved = moved.max(going);
        for txn in txns {
            match node.meta.txn(txn).await {
                Ok(TxnOutcome::Committed(_) | TxnOutcome::Conflict) => {}
                Err(error) => {
                    tracing::warn!(%error, "cannot hand heads over before the end: other nodes will replace them");
                    return;
                }
            }
        }
        let _ = tokio::time::timeout(LOOK_AGAIN, changes.changed()).await;
    }
    if moved > 0 {
        tracing::info!(heads = moved, "handed over before the end, as far as that went");
    }
}
