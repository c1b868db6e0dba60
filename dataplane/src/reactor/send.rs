//! Frames out: answers by the core's own queues, in order, and what waits for room in them.

use aoe_xdp::link::{Segment, Segments, TxFrame};
use aoe_xdp::target::ReplyHead;
use cluster_map::Counter;

use super::cores::send_home;
use super::{BACKLOG_MAX, Egress, Reactor};
use crate::exchange::Message;

impl Reactor {
    /// Sends an answer with a few bytes behind its head.
    pub(super) fn send_bytes(&mut self, interface: u8, head: &ReplyHead, bytes: &[u8]) {
        let Some(mut chunk) = self.pool.take_chunk() else {
            self.stats.add(Counter::MemoryExhausted, 1);
            return;
        };
        self.pool.copy_in(&mut chunk, 0, bytes);
        let mut data = Segments::new();
        let len = u16::try_from(bytes.len()).expect("less than a chunk");
        let fits = data.push(Segment { chunk, offset: 0, len }).is_ok();
        debug_assert!(fits);
        self.send(interface, head, data);
    }

    /// Queues an answer on the way out of its interface.
    pub(super) fn send(&mut self, interface: u8, head: &ReplyHead, data: Segments) {
        match self.egress[usize::from(interface)] {
            Egress::Own(at) => self.transmit(at, interface, head, data),
            Egress::Other(core) => self.hand_over(core, Message::Send { interface, head: *head, data }),
            Egress::Nowhere => self.give_back(data),
        }
    }

    pub(super) fn transmit(&mut self, at: usize, interface: u8, head: &ReplyHead, data: Segments) {
        let Some(mut header) = self.pool.take_header() else {
            self.stats.add(Counter::MemoryExhausted, 1);
            self.give_back(data);
            return;
        };
        *self.pool.header_bytes_mut(&mut header) = head.bytes;
        let frame = TxFrame { header, header_len: head.len, data };
        self.stats.add(Counter::TxFrames, 1);
        self.stats.add(Counter::TxBytes, frame.len() as u64);
        // Answers keep their order: behind one that waits, all wait.
        let own = &mut self.queues[at];
        let waiting = if own.backlog.is_empty() {
            own.queue.transmit_by(&mut self.pool, interface, frame).err()
        } else {
            Some(frame)
        };
        let Some(frame) = waiting else { return };
        self.stats.add(Counter::TxRingFull, 1);
        if own.backlog.len() < BACKLOG_MAX {
            own.backlog.push_back((interface, frame));
        } else {
            self.pool.release_header(frame.header);
            self.give_back(frame.data);
        }
    }

    /// Gives everything queued to the kernel and takes back what it has sent; whether there was anything.
    pub(super) fn send_out(&mut self) -> bool {
        let mut worked = false;
        let (pool, mailboxes, region, ring) = (&mut self.pool, &self.mailboxes, &self.region, &mut self.ring);
        self.unsent = false;
        for own in &mut self.queues {
            let pending = own.queue.tx_pending();
            self.unsent |= !own.queue.flush();
            worked |= pending && !own.queue.tx_pending();
            own.queue.reap(pool, &mut |chunk| send_home(mailboxes, region, ring, chunk));
            while let Some((interface, frame)) = own.backlog.pop_front() {
                match own.queue.transmit_by(pool, interface, frame) {
                    Ok(()) => worked = true,
                    Err(frame) => {
                        own.backlog.push_front((interface, frame));
                        break;
                    }
                }
            }
        }
        worked
    }
}
