//! AF_XDP queues.
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use af_xdp::frame::{RxFrame, TxFrame};
use af_xdp::nic::{Nic, NicState};
use af_xdp::region::{Chunk, Pool, Region};

use super::{LinkError, LinkInfo, LinkStats};

#[derive(Debug)]
pub(super) enum XdpInterface {}
#[derive(Debug)]
pub(super) enum XdpQueue {}
#[derive(Debug, thiserror::Error)]
#[error("not built in yet")]
pub(super) struct XdpError;
impl XdpError {
    pub(super) fn into_link_error(self, name: &str) -> LinkError {
        LinkError::NoAfXdp { interface: name.to_owned(), reason: self.to_string() }
    }
}
impl XdpInterface {
    pub(super) fn open(_: &Nic, _: NicState, _: &Arc<Region>, _: &mut LinkInfo) -> Result<Self, XdpError> {
        Err(XdpError)
    }
    pub(super) fn queues(&self) -> u16 {
        match *self {}
    }
    pub(super) fn take_queue(&mut self, _: u16, _: &mut Pool) -> Result<Option<XdpQueue>, af_xdp::Error> {
        match *self {}
    }
}
impl XdpQueue {
    pub(super) fn receive(&mut self, _: &mut Pool, _: &mut Vec<RxFrame>) -> usize {
        match *self {}
    }
    pub(super) fn transmit(&mut self, _: &mut Pool, _: TxFrame) -> Result<(), TxFrame> {
        match *self {}
    }
    pub(super) fn flush(&mut self) -> bool {
        match *self {}
    }
    pub(super) fn reap(&mut self, _: &mut Pool, _: &mut dyn FnMut(Chunk)) {
        match *self {}
    }
    pub(super) fn poll_fd(&self) -> BorrowedFd<'_> {
        match *self {}
    }
    pub(super) fn has_rx(&self) -> bool {
        match *self {}
    }
    pub(super) fn tx_pending(&self) -> bool {
        match *self {}
    }
    pub(super) fn stats(&mut self) -> LinkStats {
        match *self {}
    }
}
