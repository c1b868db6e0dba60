//! `/v1/metrics` in the Prometheus text format, from the map's counters and histograms.

use std::fmt::Write;
use std::sync::Arc;

use axum::extract::State;
use axum::http::header::CONTENT_TYPE;
use axum::response::IntoResponse;
use cluster_map::{CoreSnapshot, Counter, HistogramSnapshot, LinkLosses, ObservedLink, bucket_bounds};

use crate::node::Node;
use crate::reconcile::link_mode_words;

/// Buckets of the map per bucket that is shown: two per power of two.
const MERGED_BUCKETS: usize = 8;

#[utoipa::path(get, path = "/v1/metrics", tag = "status",
    responses((status = 200, description = "Counters and latency histograms of this node, Prometheus text format", body = String)))]
pub(crate) async fn metrics(State(node): State<Arc<Node>>) -> impl IntoResponse {
    let known = node.known();
    let mut text = String::new();
    gauge(&mut text, "torus_up", "Whether the data plane runs", u64::from(node.data_plane().pid().is_some()));
    gauge(
        &mut text,
        "torus_metadata_connected",
        "Whether the metadata is followed",
        u64::from(known.connected),
    );
    if let Some(map) = node.map()
        && let Ok(desired) = map.desired()
    {
        let named: Vec<_> = desired.cores.iter().copied().zip(map.stats()).collect();
        cores(&mut text, &named);
        links(&mut text, &map.observed().map(|observed| observed.links).unwrap_or_default());
    }
    ([(CONTENT_TYPE, "text/plain; version=0.0.4")], text)
}

// Writing to a string cannot fail: the results are dropped.
fn gauge(text: &mut String, name: &str, help: &str, value: u64) {
    let _ = writeln!(text, "# HELP {name} {help}.\n# TYPE {name} gauge\n{name} {value}");
}

fn cores(text: &mut String, stats: &[(u16, CoreSnapshot)]) {
    for counter in Counter::ALL {
        let name = counter.name();
        let _ = writeln!(text, "# TYPE torus_{name}_total counter");
        for (core, stats) in stats {
            let _ = writeln!(text, "torus_{name}_total{{core=\"{core}\"}} {}", stats.get(*counter));
        }
    }
    histograms(text, "torus_read_seconds", stats, |s| &s.read_ns);
    histograms(text, "torus_write_seconds", stats, |s| &s.write_ns);
}

/// Per interface and queue: state, mode and losses.
fn links(text: &mut String, links: &[ObservedLink]) {
    let label = |link: &ObservedLink| format!("interface=\"{}\",queue=\"{}\"", link.interface, link.queue);
    let _ = writeln!(text, "# TYPE torus_link_up gauge");
    for link in links {
        let mode = link_mode_words(link.mode);
        let _ = writeln!(text, "torus_link_up{{{},mode=\"{mode}\"}} {}", label(link), u8::from(link.up));
    }
    for (name, _) in LinkLosses::default().named() {
        let _ = writeln!(text, "# TYPE torus_link_{name}_total counter");
        for link in links {
            let count = link.losses.named().find(|(other, _)| *other == name).map_or(0, |(_, count)| count);
            let _ = writeln!(text, "torus_link_{name}_total{{{}}} {count}", label(link));
        }
    }
}

fn seconds(ns: u64) -> f64 {
    std::time::Duration::from_nanos(ns).as_secs_f64()
}

fn histograms(
    text: &mut String,
    name: &str,
    stats: &[(u16, CoreSnapshot)],
    of: impl Fn(&CoreSnapshot) -> &HistogramSnapshot,
) {
    let _ = writeln!(text, "# TYPE {name} histogram");
    for (core, stats) in stats {
        let histogram = of(stats);
        let mut below = 0u64;
        for (index, counts) in histogram.buckets().chunks(MERGED_BUCKETS).enumerate() {
            below += counts.iter().sum::<u64>();
            let le = seconds(bucket_bounds(index * MERGED_BUCKETS + counts.len() - 1).1);
            let _ = writeln!(text, "{name}_bucket{{core=\"{core}\",le=\"{le}\"}} {below}");
        }
        let _ = writeln!(text, "{name}_bucket{{core=\"{core}\",le=\"+Inf\"}} {below}");
        let _ = writeln!(text, "{name}_sum{{core=\"{core}\"}} {}", seconds(histogram.sum_ns()));
        let _ = writeln!(text, "{name}_count{{core=\"{core}\"}} {below}");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_counter_and_histogram_is_there_per_core() {
        let mut text = String::new();
        cores(&mut text, &[(2, CoreSnapshot::default()), (3, CoreSnapshot::default())]);
        for counter in Counter::ALL {
            assert!(text.contains(&format!("torus_{}_total{{core=\"3\"}} 0", counter.name())), "{text}");
        }
        assert!(text.contains("torus_read_seconds_bucket{core=\"2\",le=\"+Inf\"} 0"));
        assert!(text.contains("torus_write_seconds_count{core=\"3\"} 0"));
    }

    #[test]
    fn every_link_shows_its_mode_and_what_it_lost() {
        let losses = LinkLosses { rx_ring_full: 7, tx_dropped: 9, ..LinkLosses::default() };
        let link = ObservedLink {
            interface: "eth0@5".into(),
            queue: 1,
            up: true,
            losses,
            ..ObservedLink::default()
        };
        let mut text = String::new();
        links(&mut text, &[link]);
        for line in [
            "torus_link_up{interface=\"eth0@5\",queue=\"1\",mode=\"packet\"} 1",
            "torus_link_rx_ring_full_total{interface=\"eth0@5\",queue=\"1\"} 7",
            "torus_link_tx_dropped_total{interface=\"eth0@5\",queue=\"1\"} 9",
            "torus_link_rx_dropped_total{interface=\"eth0@5\",queue=\"1\"} 0",
        ] {
            assert!(text.contains(line), "{line}: {text}");
        }
    }
}
