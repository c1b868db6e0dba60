//! The route of an export's clients: what each initiator asks of it.
//!
//! Only the node that serves an export counts them, in the shared map. Any other node asks that node's API and passes the
//! answer on; where it cannot, it says whom to ask. A question that was passed on names the node that is meant and goes no
//! further: a node's API may listen on an address that means another node here.

use std::time::Duration;

use axum::Json;
use axum::extract::State;
use cluster_map::{ClientCounter, ClientSnapshot, MapReader, NodeId};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::{Path, Query};
use super::handlers::{Answer, Shared, known};
use super::{render, types as t};
use crate::client::{Client, ClientError, parse_endpoint, segment};
use crate::model::{Address, Mac};
use crate::node::Node;
use crate::ops::{self, Refusal, RefusalKind};

/// How long another node's answer may take.
const PASSED_ON: Duration = Duration::from_secs(5);

/// Who is to answer.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Meant {
    /// Id of the node that is asked; set when a node passes a question on.
    node: Option<String>,
}

/// What each initiator asked of the export since its node's data plane started, or since the initiator was seen first.
#[utoipa::path(get, path = "/v1/exports/{volume}/clients", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT"), Meant),
    responses((status = 200, body = t::ClientList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn clients(
    State(node): Shared,
    Path(volume): Path<String>,
    Query(meant): Query<Meant>,
) -> Answer<t::ClientList> {
    let known = known(&node)?;
    let (address, export) = ops::find_export(&known.view, &volume)?;
    let of = known.view.serving_node(export.record.volume).unwrap_or(node.id);
    let label = known.view.node_label(of);
    if meant.node.is_some_and(|meant| meant != node.id.to_string()) {
        // Two nodes whose API listens on the same loopback address.
        let message = format!("this is node {}, another one was asked", node.name);
        return Err(Refusal::new(RefusalKind::Conflict, "wrong_node", message, "").into());
    }
    if of == node.id {
        let clients = here(&node, address)?;
        return Ok(Json(t::ClientList { node: label, address: address.to_string(), clients }));
    }
    let api = known.view.nodes.get(&of).map(|member| member.record.api_addr.clone()).unwrap_or_default();
    let hint = format!(
        "only node {label} counts them: ask it there with `torusblk clients {volume}`; start its torusd with an --api \
         address that the other nodes can reach"
    );
    let unreachable = |why: String| {
        let message = format!("node {label}, which serves {address}, does not answer at {api}: {why}");
        Refusal::new(RefusalKind::Unavailable, "node_unreachable", message, &hint)
    };
    Ok(Json(elsewhere(&api, of, address).await.map_err(unreachable)?))
}

/// The clients of an export that this node serves, those first that were seen last.
fn here(node: &Node, address: Address) -> Result<Vec<t::ExportClient>, Refusal> {
    let Some(map) = node.map().filter(|_| node.data_plane().pid().is_some()) else {
        let message = "the data plane does not run: nothing is counted";
        let hint = "see `torusctl node show`";
        return Err(Refusal::new(RefusalKind::Unavailable, "no_data_plane", message, hint));
    };
    read(&map, address).map_err(|error| {
        Refusal::new(RefusalKind::Internal, "map_unreadable", error.to_string(), "see torusd's log")
    })
}

fn read(map: &MapReader, address: Address) -> Result<Vec<t::ExportClient>, cluster_map::MapError> {
    let mut clients = map.clients_of(address.shelf, address.slot)?;
    clients.sort_by_key(|client| std::cmp::Reverse(client.last_seen_ns));
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    let now_ns =
        u64::try_from(now.tv_sec).unwrap_or(0) * 1_000_000_000 + u64::try_from(now.tv_nsec).unwrap_or(0);
    Ok(clients.iter().map(|client| render(client, now_ns)).collect())
}

fn render(client: &ClientSnapshot, now_ns: u64) -> t::ExportClient {
    let ago_ms = |then_ns: u64| now_ns.saturating_sub(then_ns) / 1_000_000;
    t::ExportClient {
        mac: Mac(client.mac).to_string(),
        last_seen_ms_ago: ago_ms(client.last_seen_ns),
        first_seen_ms_ago: ago_ms(client.first_seen_ns),
        in_flight: client.in_flight,
        in_flight_max: client.in_flight_max,
        counters: ClientCounter::ALL.iter().map(|c| (c.name().to_owned(), client.get(*c))).collect(),
        read: render::latency(&client.read_ns),
        write: render::latency(&client.write_ns),
    }
}

/// The answer of the node that serves the export.
async fn elsewhere(api: &str, of: NodeId, address: Address) -> Result<t::ClientList, String> {
    let client = Client::new(Some(parse_endpoint(api)?));
    let path = format!("/v1/exports/{}/clients?node={of}", segment(&address.to_string()));
    match tokio::time::timeout(PASSED_ON, client.get(&path)).await {
        Ok(Ok(answer)) => Ok(answer),
        Ok(Err(ClientError::Unreachable { reason, .. })) => Err(reason),
        Ok(Err(error)) => Err(error.to_string()),
        Err(_) => Err(format!("nothing within {PASSED_ON:?}")),
    }
}
