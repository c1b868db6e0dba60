//! Carries out what initiators ask to be changed over AoE.
//!
//! The data plane names the requests in the observed state and waits; each is decided on the export's record as it is in the
//! metadata store, committed by compare-and-swap on that one record, and answered in the desired state once this node's own
//! view has the change, so that no initiator is told of a change that could be lost or that is not in force.
//!
//! A request is carried out at most once, whatever dies when: the record names the last one (`last_change`), the answers
//! stand in the map, and of each export the next is begun only when the answer to the former is in the map. So a torusd
//! that starts anew finds an unanswered request either not carried out at all, or named in the record. One at a time per
//! export, and few at a time in all, also keep a station that floods requests from flooding the metadata store.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use cluster_map::{ChangeAnswer, ChangeOutcome, ChangeRequest, VolumeId};
use tokio::task::{AbortHandle, JoinSet};

use crate::known::Known;
use crate::meta::{Compare, MetaError, MetaStore, Revision, Txn, TxnOutcome};
use crate::model::{ExportRecord, Mac, ModelError, decode, encode, keys};
use crate::node::Node;
use crate::settings::{ChangeId, ExportSettings};

/// Most requests that are carried out at a time.
const CONCURRENT: usize = 8;
/// Time before a request that failed is tried again.
const RETRY: Duration = Duration::from_millis(500);
/// The same after somebody else changed the record first.
const RETRY_CONFLICT: Duration = Duration::from_millis(5);

/// How far a request is.
#[derive(Debug)]
enum Progress {
    /// A task works on it.
    Running { volume: VolumeId, task: AbortHandle },
    /// It is decided; the answer waits until this node's view is at the revision.
    Decided { volume: VolumeId, outcome: ChangeOutcome, revision: Revision },
    /// It is answered, but the answer is not in the map yet.
    Answered { volume: VolumeId, outcome: ChangeOutcome },
    /// The answer is in the map.
    Published(ChangeOutcome),
}

/// The requests of one node's data plane.
pub(crate) struct AoeChanges {
    node: Arc<Node>,
    requests: BTreeMap<u64, Progress>,
    tasks: JoinSet<(u64, Decision)>,
}

/// What became of a request, and the revision of the record that shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Decision {
    outcome: ChangeOutcome,
    revision: Revision,
}

impl AoeChanges {
    pub(crate) fn new(node: Arc<Node>) -> Self {
        Self { node, requests: BTreeMap::new(), tasks: JoinSet::new() }
    }

    /// Goes on from the answers that a map was found with.
    pub(crate) fn adopt(&mut self, answers: &[ChangeAnswer]) {
        self.requests.extend(answers.iter().map(|answer| (answer.id, Progress::Published(answer.outcome))));
    }

    /// Waits until a request is decided; for ever if none is being carried out.
    pub(crate) async fn decided(&mut self) {
        let Some(ended) = self.tasks.join_next().await else { return std::future::pending().await };
        // A request that was withdrawn has no task any more.
        let Ok((id, Decision { outcome, revision })) = ended else { return };
        if let Some(progress) = self.requests.get_mut(&id)
            && let Progress::Running { volume, .. } = progress
        {
            *progress = Progress::Decided { volume: *volume, outcome, revision };
        }
    }

    /// Forgets what the data plane does not ask for any more.
    pub(crate) fn keep_asked(&mut self, asked: &[ChangeRequest]) {
        let asked: BTreeSet<u64> = asked.iter().map(|request| request.id).collect();
        self.requests.retain(|id, progress| {
            let keep = asked.contains(id);
            if let (false, Progress::Running { task, .. }) = (keep, progress) {
                task.abort();
            }
            keep
        });
    }

    /// The answers for the desired state that is made of this view.
    pub(crate) fn answers(&mut self, known: &Known) -> Vec<ChangeAnswer> {
        for progress in self.requests.values_mut() {
            if let Progress::Decided { volume, outcome, revision } = *progress
                && known.revision >= revision
            {
                *progress = Progress::Answered { volume, outcome };
            }
        }
        let answered = self.requests.iter().filter_map(|(id, progress)| match progress {
            Progress::Running { .. } | Progress::Decided { .. } => None,
            Progress::Answered { outcome, .. } | Progress::Published(outcome) => {
                Some(ChangeAnswer { id: *id, outcome: *outcome })
            }
        });
        answered.collect()
    }

    /// Takes note that these answers are in the map.
    pub(crate) fn published(&mut self, answers: &[ChangeAnswer]) {
        for answer in answers {
            if let Some(progress) = self.requests.get_mut(&answer.id) {
                *progress = Progress::Published(answer.outcome);
            }
        }
    }

    /// Begins what can be begun: of each export the first that is not answered, if nothing of it is on its way.
    pub(crate) fn begin(&mut self, asked: &[ChangeRequest], known: &Known) {
        if asked.is_empty() || !known.usable() || !known.connected {
            return;
        }
        let mut busy: BTreeSet<VolumeId> = BTreeSet::new();
        for progress in self.requests.values() {
            match progress {
                Progress::Running { volume, .. }
                | Progress::Decided { volume, .. }
                | Progress::Answered { volume, .. } => drop(busy.insert(*volume)),
                Progress::Published(_) => {}
            }
        }
        let mut asked: Vec<&ChangeRequest> = asked.iter().collect();
        asked.sort_unstable_by_key(|request| request.id);
        for request in asked {
            if self.requests.contains_key(&request.id) || !busy.insert(request.volume) {
                continue;
            }
            if self.tasks.len() >= CONCURRENT {
                return;
            }
            let (node, work) = (Arc::clone(&self.node), request.clone());
            let task = self.tasks.spawn(async move { (work.id, carry_out(&node, &work).await) });
            self.requests.insert(request.id, Progress::Running { volume: request.volume, task });
        }
    }
}

/// Tries until the request is decided.
async fn carry_out(node: &Node, request: &ChangeRequest) -> Decision {
    let mut said = false;
    loop {
        match attempt(node, request).await {
            Ok(Some(decision)) => {
                let (client, outcome) = (Mac(request.client), decision.outcome);
                tracing::debug!(volume = %request.volume, %client, ?outcome, "an initiator asked for a change");
                return decision;
            }
            Ok(None) => tokio::time::sleep(RETRY_CONFLICT).await,
            Err(error) => {
                if !std::mem::replace(&mut said, true) {
                    tracing::warn!(error, volume = %request.volume, "a change over AoE waits: keeps trying");
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Decides a request once; `None` if it is to be decided anew because the record has changed.
async fn attempt(node: &Node, request: &ChangeRequest) -> Result<Option<Decision>, String> {
    let known = node.known();
    if !known.usable() || !known.connected {
        return Err(format!("metadata {}", known.words()));
    }
    let volume = known
        .view
        .volumes
        .get(&request.volume)
        .filter(|_| known.view.serving_node(request.volume) == Some(node.id));
    let Some(address) = volume.and_then(|volume| volume.record.export) else {
        return Ok(Some(Decision { outcome: ChangeOutcome::Refused, revision: Revision(0) }));
    };
    decide(node.meta.as_ref(), &keys::export(address), ChangeId { node: node.id, id: request.id }, request)
        .await
}

async fn decide(
    meta: &dyn MetaStore,
    key: &str,
    this: ChangeId,
    request: &ChangeRequest,
) -> Result<Option<Decision>, String> {
    let found = meta.get(key).await.map_err(|error| error.to_string())?;
    let Some(found) = found else {
        return Ok(Some(Decision { outcome: ChangeOutcome::Refused, revision: Revision(0) }));
    };
    let decided = |outcome| Ok(Some(Decision { outcome, revision: found.mod_revision }));
    let record: ExportRecord = decode(key, &found.value).map_err(|error: ModelError| error.to_string())?;
    if record.volume != request.volume || record.ending {
        return decided(ChangeOutcome::Refused);
    }
    if record.settings.last_change == Some(this) {
        return decided(ChangeOutcome::Done);
    }
    let changed = match record.settings.changed(Mac(request.client), &request.change) {
        Ok(changed) if changed == record.settings => return decided(ChangeOutcome::Done),
        Ok(changed) => changed,
        Err(outcome) => return decided(outcome),
    };
    let settings = ExportSettings { last_change: Some(this), ..changed };
    let txn = Txn::new()
        .when(Compare::Revision(key.to_owned(), found.mod_revision))
        .put(key, encode(&ExportRecord { settings, ..record }));
    match meta.txn(txn).await {
        Ok(TxnOutcome::Committed(revision)) => Ok(Some(Decision { outcome: ChangeOutcome::Done, revision })),
        // Of an unknown outcome the record tells.
        Ok(TxnOutcome::Conflict) | Err(MetaError::Unknown(_)) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::meta::memory::{MemoryStore, TxnFault};
    use crate::settings::{ConfigString, Policy, Who};
    use cluster_map::{Change, NodeId, SetRule};

    const KEY: &str = "torus/exports/1.1";
    const VOLUME: VolumeId = VolumeId([7; 16]);

    fn request(id: u64, from: &str, to: &str) -> ChangeRequest {
        let rule = SetRule::Replace { expected: from.into() };
        let change = Change::SetString { rule, string: to.into() };
        ChangeRequest { id, volume: VOLUME, client: [2, 0, 0, 0, 0, 1], change }
    }

    async fn put(meta: &MemoryStore, change: impl FnOnce(&mut ExportRecord)) -> ExportRecord {
        let policy = Policy { config: Who::Anyone, ..Policy::default() };
        let settings = ExportSettings { policy, ..ExportSettings::default() };
        let mut record =
            ExportRecord { volume: VOLUME, mac: Mac([2; 6]), read_only: false, ending: false, settings };
        if let Some(found) = meta.get(KEY).await.unwrap() {
            record = decode(KEY, &found.value).unwrap();
        }
        change(&mut record);
        assert!(meta.txn(Txn::new().put(KEY, encode(&record))).await.unwrap().committed());
        record
    }

    async fn string(meta: &MemoryStore) -> String {
        put(meta, |_| {}).await.settings.config_string.to_string()
    }

    /// As a torusd does: until it is decided.
    async fn decide_finally(meta: &MemoryStore, request: &ChangeRequest) -> ChangeOutcome {
        let this = ChangeId { node: NodeId([1; 16]), id: request.id };
        for _ in 0..8 {
            if let Ok(Some(decision)) = decide(meta, KEY, this, request).await {
                return decision.outcome;
            }
        }
        panic!("not decided");
    }

    #[tokio::test]
    async fn a_change_is_made_once_however_often_it_is_begun() {
        for fault in
            [None, Some(TxnFault::AnswerLost), Some(TxnFault::RequestLost), Some(TxnFault::Unavailable)]
        {
            let meta = MemoryStore::new();
            put(&meta, |_| {}).await;
            for (id, from, to) in [(1, "", "a"), (2, "a", "b"), (3, "b", "a")] {
                if let Some(fault) = fault {
                    meta.fail_txn(fault);
                }
                let request = request(id, from, to);
                assert_eq!(decide_finally(&meta, &request).await, ChangeOutcome::Done, "{fault:?}");
                // A torusd that died before it had answered begins it again.
                assert_eq!(decide_finally(&meta, &request).await, ChangeOutcome::Done, "{fault:?}");
                assert_eq!(string(&meta).await, to);
            }
        }
    }

    #[tokio::test]
    async fn what_is_refused_changes_nothing() {
        let meta = MemoryStore::new();
        assert_eq!(decide_finally(&meta, &request(1, "", "a")).await, ChangeOutcome::Refused, "no export");
        let before = put(&meta, |_| {}).await;
        assert_eq!(decide_finally(&meta, &request(1, "x", "a")).await, ChangeOutcome::StringPresent);
        let other = ChangeRequest { volume: VolumeId([8; 16]), ..request(2, "", "a") };
        assert_eq!(
            decide_finally(&meta, &other).await,
            ChangeOutcome::Refused,
            "another volume's address now"
        );
        assert_eq!(put(&meta, |_| {}).await, before);
        put(&meta, |record| record.ending = true).await;
        assert_eq!(decide_finally(&meta, &request(3, "", "a")).await, ChangeOutcome::Refused);
    }

    #[tokio::test]
    async fn an_administrator_may_come_in_between() {
        let meta = MemoryStore::new();
        put(&meta, |_| {}).await;
        let first = request(1, "", "a");
        assert_eq!(decide_finally(&meta, &first).await, ChangeOutcome::Done);
        put(&meta, |record| record.settings.config_string = ConfigString::default()).await;
        assert_eq!(decide_finally(&meta, &first).await, ChangeOutcome::Done, "made before");
        assert_eq!(string(&meta).await, "", "and not made again");
        put(&meta, |record| record.settings.policy = Policy::default()).await;
        assert_eq!(decide_finally(&meta, &request(2, "", "a")).await, ChangeOutcome::Refused);
    }
}
