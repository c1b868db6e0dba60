//! A volume with a copy on each of three nodes, which are processes of their own: real frames, real connections, real stores. The test
//! is the metadata: it makes the changes that heads wish for, and says who is head.

use std::time::{Duration, Instant};

use aoe_xdp::wire::{Address, AtaArg, AtaHead, Header, Mac, command};
use cluster_map::{
    DesiredHead, DesiredPeer, DesiredVolume, HeadOwner, HeadPartition, HeadState, MemberId, NodeId, PeerAddr,
    StaleMark, VolumeIntent,
};
use zerocopy::IntoBytes;

use crate::netns;
use crate::node::{Node, Station, VOLUME_SECTORS, export, volume_id};

const CLIENT: Mac = Mac([0x02, 0, 0, 0, 0xc1, 0x30]);
const BASE_PORT: u16 = 4420;
const BLOCK: usize = 4096;
/// Blocks that are written and read, across the border between two extents.
const BLOCKS: std::ops::Range<u64> = 1000..1040;
/// How long an initiator waits before it asks again.
const PATIENCE: Duration = Duration::from_millis(200);
/// Longer than any take-over.
const GIVE_UP: Duration = Duration::from_secs(20);

struct Cluster {
    nodes: Vec<Node>,
    members: Vec<MemberId>,
    /// The volume's record.
    head: DesiredHead,
    head_node: usize,
    station: Station,
    tag: u32,
    /// What every block holds: the number of the write.
    written: Vec<u8>,
}

fn listen(node: usize) -> PeerAddr {
    PeerAddr { ip: [127, 0, 0, 1].into(), base_port: BASE_PORT + u16::try_from(node).unwrap() * 16 }
}

impl Cluster {
    fn start() -> Cluster {
        netns::ip("link set lo up");
        netns::veth_pair(9000, 1);
        let number = |node: usize| u8::try_from(node + 1).unwrap();
        let mut nodes: Vec<Node> =
            (0..3).map(|node| Node::start_member(number(node), listen(node), 4)).collect();
        let members: Vec<MemberId> =
            nodes.iter_mut().map(|node| MemberId { store: node.store(), incarnation: 1 }).collect();
        let owners = (0..3).map(|node| HeadOwner {
            member: members[node],
            node: NodeId([number(node); 16]),
            shards: 1,
            is_complete: true,
        });
        let partition = HeadPartition { epoch: 1, owners: owners.collect() };
        let head = DesiredHead {
            volume: volume_id(0),
            takeover: 0,
            revision: 10,
            min_copies: 0,
            partitions: vec![partition],
            stale: Vec::new(),
            is_moving: false,
            edition: 0,
        };
        let written = vec![0; usize::try_from(BLOCKS.end - BLOCKS.start).unwrap()];
        let station = Station::open();
        let mut cluster = Cluster { nodes, members, head, head_node: 0, station, tag: 1, written };
        for node in 0..3 {
            let peers = (0..3).filter(|other| *other != node).map(|other| DesiredPeer {
                node: NodeId([number(other); 16]),
                addr: listen(other),
                cores: 1,
            });
            let desired = &mut cluster.nodes[node].desired;
            desired.peers = peers.collect();
            desired.volumes = vec![DesiredVolume {
                id: volume_id(0),
                store: cluster.members[node].store,
                size_sectors: 2 * VOLUME_SECTORS,
                state: VolumeIntent::Active,
                lane: Some(0),
            }];
            cluster.nodes[node].publish();
        }
        cluster
    }

    /// Says who is head, under a new take-over.
    fn take_over(&mut self, node: usize) {
        self.head.takeover += 1;
        self.head.revision += 1;
        let former = std::mem::replace(&mut self.head_node, node);
        if former != node {
            let desired = &mut self.nodes[former].desired;
            (desired.heads, desired.exports) = (Vec::new(), Vec::new());
        }
        self.publish_head();
    }

    fn publish_head(&mut self) {
        let node = &mut self.nodes[self.head_node];
        node.desired.heads = vec![self.head.clone()];
        node.desired.exports = vec![export(0)];
        node.publish();
    }

    /// Makes the change that the head wishes for, if it does; whether it did.
    fn grant_wish(&mut self) -> bool {
        let seen = self.nodes[self.head_node].control.reader().observed().unwrap_or_default();
        let Some(wish) = seen.wishes.into_iter().find(|wish| wish.revision == self.head.revision) else {
            return false;
        };
        for stale in wish.eject {
            if !self.head.stale.iter().any(|known| known.member == stale.member) {
                self.head.stale.push(stale);
            }
        }
        self.head.stale.retain(|stale| !wish.join.contains(&stale.member));
        self.head.revision += 1;
        self.publish_head();
        true
    }

    /// Asks until there is an answer, as an initiator does, with a new tag each time; what it says.
    fn ask(&mut self, block: u64, data: Option<&[u8]>) -> Vec<u8> {
        let wish = export(0);
        let address = Address { shelf: wish.shelf, slot: wish.slot };
        let deadline = Instant::now() + GIVE_UP;
        while Instant::now() < deadline {
            self.tag += 1;
            let header = Header::request(Mac(wish.mac), CLIENT, address, command::ATA, self.tag);
            let arg = AtaArg::read_write_ext(block * 8, 8, data.is_some());
            let mut frame = AtaHead { header, arg }.as_bytes().to_vec();
            frame.extend(data.unwrap_or_default());
            self.station.send(&frame);
            let answer = self.station.receive(self.tag, PATIENCE);
            self.grant_wish();
            if let Some(answer) = answer {
                assert_eq!(answer[27], 0x40, "block {block}: an ATA error");
                return answer[36..].to_vec();
            }
        }
        for node in &self.nodes {
            eprintln!("{:?}", node.control.reader().observed());
        }
        panic!("no answer for block {block} within {GIVE_UP:?}");
    }

    fn write_all(&mut self, round: u8) {
        for block in BLOCKS {
            let at = usize::try_from(block - BLOCKS.start).unwrap();
            self.ask(block, Some(&[round; BLOCK]));
            self.written[at] = round;
        }
    }

    fn check_all(&mut self) {
        for block in BLOCKS {
            let at = usize::try_from(block - BLOCKS.start).unwrap();
            let data = self.ask(block, None);
            assert!(data == [self.written[at]; BLOCK], "block {block} is not what was written");
        }
    }

    /// Until every copy is in sync.
    fn heal(&mut self) {
        let deadline = Instant::now() + GIVE_UP;
        while !self.head.stale.is_empty() {
            assert!(Instant::now() < deadline, "{:?} are stale still", self.head.stale);
            self.grant_wish();
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn stale(&self) -> Vec<MemberId> {
        self.head.stale.iter().map(|StaleMark { member, .. }| *member).collect()
    }
}

#[test]
fn three_copies_survive_the_loss_of_any_node() {
    netns::isolated("replicas::three_copies_survive_the_loss_of_any_node", || {
        let mut cluster = Cluster::start();
        cluster.take_over(0);
        cluster.write_all(1);
        cluster.check_all();

        // A replica.
        cluster.nodes[2].kill();
        cluster.write_all(2);
        assert_eq!(cluster.stale(), [cluster.members[2]]);
        cluster.nodes[2].start_again();
        cluster.heal();
        cluster.check_all();

        // The head, which comes back at once.
        cluster.nodes[0].kill();
        cluster.nodes[0].start_again();
        cluster.check_all();
        cluster.write_all(3);

        // The head, which does not.
        cluster.nodes[0].kill();
        cluster.take_over(1);
        cluster.check_all();
        cluster.write_all(4);
        assert_eq!(cluster.stale(), [cluster.members[0]]);
        cluster.nodes[0].start_again();
        cluster.heal();

        // Whoever was away has everything: it alone is read from.
        cluster.take_over(0);
        cluster.check_all();
        let seen = cluster.nodes[0].wait("it serves", |seen| {
            seen.heads.iter().any(|head| head.state == HeadState::Serving && head.takeover == 3)
        });
        assert_eq!((seen.heads[0].copies_in_sync, seen.heads[0].copies_needed), (3, 3));
        for node in cluster.nodes {
            node.stop();
        }
    });
}
