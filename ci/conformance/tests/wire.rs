//! Every case over a virtual Ethernet against a running node.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use torus_conformance::node;
use torus_conformance::{cases, for_each_case};

macro_rules! against_a_node {
    ($($case:ident)*) => {
        $(#[test]
        fn $case() {
            node::run(stringify!($case), cases::$case);
        })*
    };
}

for_each_case!(against_a_node);
