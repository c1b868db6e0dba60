//! Every case that is about frames, against the state machine alone.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use torus_conformance::frames::Request;
use torus_conformance::model::{self, Model};
use torus_conformance::world::{Carrier, EXPORTS, World};
use torus_conformance::{cases, for_each_case};

macro_rules! against_the_model {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            model::run(cases::$case);
        })*
    };
}

for_each_case!(against_the_model);

#[test]
fn case_32_an_advertisement() {
    let mut model = Model::new();
    let first = torus_conformance::frames::Reply(model.receive(std::time::Duration::ZERO).unwrap());
    assert_eq!((first.dst(), first.version_flags(), first.tag()), ([0xff; 6], 0x18, 0));
    assert_eq!((first.src(), first.address()), (model.export_mac(0), (EXPORTS[0].shelf, EXPORTS[0].slot)));
}

#[test]
fn case_55_a_failing_disk() {
    use aoe_xdp::target::Outcome;
    let mut model = Model::new();
    for (outcome, read, write) in
        [(Outcome::Uncorrectable, (0x41, 0x40), (0x41, 0x40)), (Outcome::Fault, (0x61, 0x04), (0x61, 0x04))]
    {
        model.disk_fails = Some(outcome);
        for (request, expected) in [(Request::read(0, 1), read), (Request::write(0, &[7; 512]), write)] {
            let mut world = World::new(&mut model);
            let request = world.main(request);
            world.send(&request);
            assert_eq!(world.answer(&request).ata(), expected);
        }
    }
    model.disk_fails = None;
    let mut world = World::new(&mut model);
    assert_eq!(world.content(0, 0, 1), [0; 512]);
}

#[test]
fn case_78_a_volume_that_grows() {
    let mut model = Model::new();
    World::new(&mut model).forget();
    model.resize(0, 99_999);
    let mut world = World::new(&mut model);
    assert_eq!(world.advertisement().address(), (1, 2));
    assert_eq!(world.ask(Request::identify()).size_sectors(), 99_999);
}
