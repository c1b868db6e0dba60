//! Deliberate bugs, each at the place where its rule is kept: what a simulator is worth shows by how many of them it finds.
//!
//! Without `--cfg mutants` there is none: [`is`] is the constant `false`, and nothing is left of what asks it. With it one at a time is
//! active on a thread, chosen by its test.

/// A rule that is not kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mutant {
    /// A learner that begins anew is taken to have everything up to then.
    MarkRaised,
    /// A mark is not below the writes that the member has not answered.
    MarkAboveWrites,
    /// What only a returned member has is not looked at.
    ResyncSourceOnly,
    /// Extents of the same version are taken to be equal.
    EqualVersionSkipped,
    /// Of a returned member and its source, that one is copied which has the higher version.
    HigherVersionWins,
    /// A source is made equal to the member that missed writes.
    ResyncBackwards,
    /// What is absent at the source stays at a returned member.
    AbsentKept,
    /// A member is taken in again though it failed a write since it returned.
    JoinAfterFailedWrite,
    /// Blocks are copied while requests use them.
    CopyWithoutLock,
    /// A write's blocks are free when it is answered, though somebody may have it to do yet.
    UnlockedEarly,
    /// A region leaves the activity log when it is durable on this store.
    LogReleasedLocally,
    /// The stable mark passes regions that are not equal yet.
    StableBeforeEqual,
    /// A new head takes all copies to be equal.
    ReconcileSkipped,
    /// A write that was cut short is taken for what was to be written.
    SuspectGood,
    /// A generation is opened while work of a lower one is in progress.
    OpenWithoutDrain,
    /// A generation is opened while grants of a lower one count.
    FenceSkipped,
    /// A replica that has started takes it that it has granted nothing.
    RestartWithoutQuarantine,
    /// Grants cover a volume of which a higher generation has been asked for.
    RenewAfterOpen,
    /// What grants cover no longer is forgotten once the higher generation is open.
    PassedForgotten,
    /// A grant counts from when it came.
    GrantFromReply,
    /// No grant is needed.
    NoGrant,
    /// Grants are not looked at again when a request is answered.
    GrantsUncheckedAtReply,
    /// A replica does whatever generation's work.
    GenerationUnchecked,
    /// A new connection is served while work of the one before is in progress.
    ConnectionServedEarly,
    /// Versions begin at one again with each head.
    SequenceRestarts,
    /// A join of unknown outcome is taken not to have been made.
    JoinInDoubtUndone,
    /// What a store no longer owns is given up though a head may still take it for an owner.
    RetireWithoutFence,
    /// A new owner is taken to be complete from the beginning.
    OwnerCompleteAtOnce,
    /// A member that becomes an owner of more is taken in again by what it was behind with before.
    LearnerKeptThroughMove,
    /// An ejection of unknown outcome is taken to have been made.
    EjectionInDoubtDone,
    /// A change is made whatever the record has become since.
    ChangeWithoutCompare,
    /// A data plane that starts anew does not know what its predecessor wished for.
    WishForgotten,
    /// Ejections leave one member in sync where two must be.
    EjectBelowMin,
    /// Members are read that are not in sync.
    StaleRead,
    /// A block that does not match its checksum is written in part, and gets a new checksum.
    BadBlockMerged,
    /// A replica answers a write when it begins.
    AckBeforeDurable,
    /// A write is acknowledged when the first replica has it.
    AckAfterFirst,
    /// A head that hands over gives its grants back before it has answered what is in progress.
    HandedBackEarly,
    /// A head that hands over says that all is stable though writes are not on all members yet.
    CleanThoughUnequal,
    /// Grants of a head that has gone on after all are taken to be given back still.
    HandedBackForGood,
    /// A run goes beside the journal to the slot in which its blocks lie.
    RedirectedOntoItself,
    /// A run goes beside the journal though older data of its blocks are on their way to their place.
    RedirectedOverPending,
    /// A block is written in place though the last batch says of it what lies beside the journal.
    InPlaceUnproved,
    /// The first batch after opening is sent before one without records proves the last.
    BegunWithoutMark,
    /// The last batch counts whatever has become of what went beside it.
    FreshDataUnread,
    /// The header of a torn last batch stays until the next batch.
    TornHeaderKept,
    /// A slot in which no block lies goes though a batch has something of its extent.
    VacatedTooEarly,
    /// Blocks are written while they are brought to the other slot.
    WrittenWhileMoved,
    /// What was said of a block in a slot that its extent has no more is not taken to have ended what was known of it.
    FormerSlotIgnored,
}

impl Mutant {
    /// Those of what a store writes beside its journal, which its own simulation must catch.
    pub const STORE: [Mutant; 9] = [
        Mutant::RedirectedOntoItself,
        Mutant::RedirectedOverPending,
        Mutant::InPlaceUnproved,
        Mutant::BegunWithoutMark,
        Mutant::FreshDataUnread,
        Mutant::TornHeaderKept,
        Mutant::VacatedTooEarly,
        Mutant::WrittenWhileMoved,
        Mutant::FormerSlotIgnored,
    ];

    /// Those that the simulation of clusters must catch.
    pub const CLUSTER: [Mutant; 40] = [
        Mutant::MarkRaised,
        Mutant::RetireWithoutFence,
        Mutant::OwnerCompleteAtOnce,
        Mutant::LearnerKeptThroughMove,
        Mutant::MarkAboveWrites,
        Mutant::ResyncSourceOnly,
        Mutant::EqualVersionSkipped,
        Mutant::HigherVersionWins,
        Mutant::ResyncBackwards,
        Mutant::AbsentKept,
        Mutant::JoinAfterFailedWrite,
        Mutant::CopyWithoutLock,
        Mutant::UnlockedEarly,
        Mutant::LogReleasedLocally,
        Mutant::StableBeforeEqual,
        Mutant::ReconcileSkipped,
        Mutant::SuspectGood,
        Mutant::OpenWithoutDrain,
        Mutant::FenceSkipped,
        Mutant::RestartWithoutQuarantine,
        Mutant::RenewAfterOpen,
        Mutant::PassedForgotten,
        Mutant::GrantFromReply,
        Mutant::NoGrant,
        Mutant::GrantsUncheckedAtReply,
        Mutant::GenerationUnchecked,
        Mutant::ConnectionServedEarly,
        Mutant::SequenceRestarts,
        Mutant::JoinInDoubtUndone,
        Mutant::EjectionInDoubtDone,
        Mutant::ChangeWithoutCompare,
        Mutant::WishForgotten,
        Mutant::EjectBelowMin,
        Mutant::StaleRead,
        Mutant::BadBlockMerged,
        Mutant::AckBeforeDurable,
        Mutant::AckAfterFirst,
        Mutant::HandedBackEarly,
        Mutant::CleanThoughUnequal,
        Mutant::HandedBackForGood,
    ];
}

#[cfg(mutants)]
mod active {
    use std::cell::Cell;

    use super::Mutant;

    thread_local! {
        static ACTIVE: Cell<Option<Mutant>> = const { Cell::new(None) };
    }

    /// Makes one active on this thread, or none.
    pub fn activate(mutant: Option<Mutant>) {
        ACTIVE.set(mutant);
    }

    /// Whether that one is active.
    #[must_use]
    pub fn is(mutant: Mutant) -> bool {
        ACTIVE.get() == Some(mutant)
    }
}

#[cfg(mutants)]
pub use active::{activate, is};

/// Whether that one is active: none is.
#[cfg(not(mutants))]
#[must_use]
#[inline(always)]
pub const fn is(_: Mutant) -> bool {
    false
}
