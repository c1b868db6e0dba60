//! What decides whether a run was right: [`history`] for what initiators were told, [`watchdog`] for what must not take
//! for ever, and [`trace`] for what is printed when either objects.

pub mod history;
pub mod trace;
pub mod watchdog;
