//! What a store keeps of a replica: the states of layers, in records of the journal and behind the entries of a checkpoint. Both
//! have the same bytes: a unit as long as a record, then the state, padded to whole units.

use std::sync::Arc;

use cluster_map::NodeId;
use zerocopy::byteorder::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned};

use super::{FormatError, RAW_STATE_BYTES, RECORD_BYTES, RawRecord, kind};

/// Epochs that a state has room for.
pub const EPOCHS_MAX: usize = 256;

/// The highest epoch of each partition that a replica has served under: in order of the partitions, each once.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Epochs(Vec<(u32, u64)>);

impl Epochs {
    /// These, partition and epoch; `None` where there are more than [`EPOCHS_MAX`], or not in order.
    #[must_use]
    pub fn new(epochs: Vec<(u32, u64)>) -> Option<Epochs> {
        let is_ordered = epochs.windows(2).all(|pair| pair[0].0 < pair[1].0);
        (is_ordered && epochs.len() <= EPOCHS_MAX).then_some(Epochs(epochs))
    }

    /// All of them: partition and epoch.
    #[must_use]
    pub fn all(&self) -> &[(u32, u64)] {
        &self.0
    }
}

/// What a replica of a layer must have durably before it acts under it (I4, I11, I14).
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct ReplicaState {
    /// The open generation: its take-over.
    pub takeover: u64,
    /// The open generation: the start of its head.
    pub start: u64,
    /// Whose generation it is.
    pub head: NodeId,
    /// Of the newest record that was served under.
    pub revision: u64,
    /// See there.
    pub epochs: Epochs,
}

impl ReplicaState {
    /// What it takes, in units of a record.
    #[must_use]
    pub fn units(&self) -> usize {
        units_of(self.epochs.0.len())
    }
}

/// What is kept of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LayerState {
    /// The layer's number in the catalog.
    pub object: u32,
    /// The highest version written to it; of extents that are gone too.
    pub version: u64,
    /// Its replica's state.
    pub state: Arc<ReplicaState>,
}

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct RawState {
    takeover: U64,
    start: U64,
    revision: U64,
    head: [u8; 16],
}
const _: () = assert!(size_of::<RawState>() == RAW_STATE_BYTES);

#[derive(FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
struct RawEpoch {
    partition: U32,
    epoch: U64,
}
const EPOCH_BYTES: usize = 12;
const _: () = assert!(size_of::<RawEpoch>() == EPOCH_BYTES);

/// Units of the largest state.
pub const STATE_UNITS_MAX: usize = units_of(EPOCHS_MAX);

const fn units_of(epochs: usize) -> usize {
    1 + (RAW_STATE_BYTES + epochs * EPOCH_BYTES).div_ceil(RECORD_BYTES)
}

impl LayerState {
    /// What it takes, in units of a record.
    #[must_use]
    pub fn units(&self) -> usize {
        self.state.units()
    }

    /// Writes it over the units that it takes.
    ///
    /// # Panics
    /// If these are others.
    pub fn encode(&self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), self.units() * RECORD_BYTES, "a state takes its units");
        let epochs = self.state.epochs.all();
        let head = RawRecord {
            kind: kind::PERSIST,
            block: U16::new(u16::try_from(epochs.len()).expect("at most EPOCHS_MAX")),
            first: U32::new(self.object),
            version: U64::new(self.version),
            ..RawRecord::default()
        };
        let state = RawState {
            takeover: U64::new(self.state.takeover),
            start: U64::new(self.state.start),
            revision: U64::new(self.state.revision),
            head: self.state.head.0,
        };
        let (of_head, rest) = bytes.split_at_mut(RECORD_BYTES);
        let (of_state, rest) = rest.split_at_mut(RAW_STATE_BYTES);
        let (of_epochs, padding) = rest.split_at_mut(epochs.len() * EPOCH_BYTES);
        of_head.copy_from_slice(head.as_bytes());
        of_state.copy_from_slice(state.as_bytes());
        for (bytes, (partition, epoch)) in of_epochs.chunks_exact_mut(EPOCH_BYTES).zip(epochs) {
            let raw = RawEpoch { partition: U32::new(*partition), epoch: U64::new(*epoch) };
            bytes.copy_from_slice(raw.as_bytes());
        }
        padding.fill(0);
    }

    /// Reads one; gives what follows it.
    ///
    /// # Errors
    /// [`FormatError`].
    pub fn decode(bytes: &[u8]) -> Result<(LayerState, &[u8]), FormatError> {
        let (head, _) = RawRecord::ref_from_prefix(bytes).map_err(|_| FormatError::Length)?;
        let count = usize::from(head.block.get());
        let is_plain = head.flags == 0 && head.slot.get() == 0 && head.second.get() == 0;
        if head.kind != kind::PERSIST || !is_plain || count > EPOCHS_MAX {
            return Err(FormatError::Value);
        }
        let (own, behind) =
            bytes.split_at_checked(units_of(count) * RECORD_BYTES).ok_or(FormatError::Length)?;
        let (raw, rest) = RawState::ref_from_prefix(&own[RECORD_BYTES..]).map_err(|_| FormatError::Length)?;
        let (epochs, padding) = rest.split_at_checked(count * EPOCH_BYTES).ok_or(FormatError::Length)?;
        let epochs = <[RawEpoch]>::ref_from_bytes(epochs).map_err(|_| FormatError::Length)?;
        let epochs = epochs.iter().map(|raw| (raw.partition.get(), raw.epoch.get())).collect();
        if padding.iter().any(|byte| *byte != 0) {
            return Err(FormatError::Value);
        }
        let state = ReplicaState {
            takeover: raw.takeover.get(),
            start: raw.start.get(),
            head: NodeId(raw.head),
            revision: raw.revision.get(),
            epochs: Epochs::new(epochs).ok_or(FormatError::Value)?,
        };
        let layer =
            LayerState { object: head.first.get(), version: head.version.get(), state: Arc::new(state) };
        Ok((layer, behind))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn layer(epochs: u32) -> LayerState {
        let epochs = (0..epochs).map(|at| (3 * at, u64::from(at) << 40 | 5)).collect();
        let state = ReplicaState {
            takeover: 7,
            start: 1 << 60,
            head: NodeId([9; 16]),
            revision: 11,
            epochs: Epochs::new(epochs).unwrap(),
        };
        LayerState { object: 4, version: 77, state: Arc::new(state) }
    }

    fn encoded(layer: &LayerState) -> Vec<u8> {
        let mut bytes = vec![0xee; layer.units() * RECORD_BYTES];
        layer.encode(&mut bytes);
        bytes
    }

    #[test]
    fn states_are_read_as_they_were_written() {
        for (epochs, units) in [(0, 3), (1, 4), (2, 4), (3, 5), (256, 131)] {
            let layer = layer(epochs);
            assert_eq!(layer.units(), units, "{epochs} epochs");
            let mut bytes = encoded(&layer);
            bytes.extend([1, 2, 3]);
            assert_eq!(LayerState::decode(&bytes), Ok((layer, &[1, 2, 3][..])));
            bytes.truncate(units * RECORD_BYTES - 1);
            assert_eq!(LayerState::decode(&bytes), Err(FormatError::Length));
        }
        assert_eq!(STATE_UNITS_MAX, 131);
    }

    #[test]
    fn more_epochs_than_there_is_room_for_or_out_of_order_are_no_state() {
        assert!(Epochs::new((0..257).map(|at| (at, 1)).collect()).is_none());
        assert!(Epochs::new(vec![(1, 1), (1, 2)]).is_none());
        assert!(Epochs::new(vec![(2, 1), (1, 1)]).is_none());
    }

    #[test]
    fn a_state_that_cannot_be_is_refused() {
        let good = encoded(&layer(2));
        // Another kind, a flag, a slot, something in the second field; too many epochs; a partition twice; something behind the last.
        for (at, byte) in [(0, 7), (1, 1), (4, 1), (12, 1), (3, 2), (64, 3), (95, 1)] {
            let mut bytes = good.clone();
            assert_ne!(bytes[at], byte);
            bytes[at] = byte;
            let decoded = LayerState::decode(&bytes);
            assert!(decoded.is_err(), "byte {at} as {byte}: {decoded:?}");
        }
    }
}
