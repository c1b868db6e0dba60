//! The routes.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use cluster_map::{ClusterId, VolumeId};
use serde::Deserialize;
use utoipa::IntoParams;

use super::error::{ApiError, Body, Path, Query};
use super::settings::parse_policy;
use super::types as t;
use super::{document, render};
use crate::checks;
use crate::known::Known;
use crate::model::{Address, DEFAULT_EXTENT_BYTES, StoreSpec, View, VolumeState};
use crate::moves;
use crate::node::{Node, unix_s};
use crate::ops::{self, NewExport, NewVolume, Refusal, RefusalKind};

/// Longest wait that a request can ask for.
const WAIT_LIMIT: Duration = Duration::from_secs(600);

pub(super) type Shared = State<Arc<Node>>;
pub(super) type Answer<T> = Result<Json<T>, ApiError>;

/// How long an answer may take.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct Wait {
    /// Answer only when the work is done, or has failed (at most 10 minutes): `?wait` or `?wait=true`.
    wait: Option<String>,
}

impl Wait {
    fn asked(&self) -> bool {
        self.wait.as_deref().is_some_and(|wait| matches!(wait, "" | "1" | "true" | "yes"))
    }
}

/// What is known; an error before the first answer of the metadata store.
pub(super) fn known(node: &Node) -> Result<Arc<Known>, Refusal> {
    let known = node.known();
    if known.listed() {
        return Ok(known);
    }
    let message = format!("no answer yet from {}", node.meta.describe());
    let hint = "this node keeps trying; check that the metadata store runs and can be reached";
    Err(Refusal::new(RefusalKind::Unavailable, "metadata_unavailable", message, hint))
}

fn len<T>(map: &std::collections::BTreeMap<T, impl Sized>) -> u64 {
    u64::try_from(map.len()).unwrap_or(u64::MAX)
}

pub(crate) async fn root() -> &'static str {
    "Torus. The API is under /v1, described by /v1/openapi.json.\n"
}

#[utoipa::path(get, path = "/v1/version", tag = "status", responses((status = 200, body = t::Version)))]
pub(crate) async fn version() -> Json<t::Version> {
    Json(t::Version { version: env!("CARGO_PKG_VERSION").into(), api: "v1".into() })
}

#[utoipa::path(get, path = "/v1/openapi.json", tag = "status", responses((status = 200, description = "This document")))]
pub(crate) async fn openapi() -> Json<utoipa::openapi::OpenApi> {
    Json(document())
}

#[utoipa::path(get, path = "/v1/status", tag = "status", responses((status = 200, body = t::Status)))]
pub(crate) async fn status(State(node): Shared) -> Json<t::Status> {
    let known = node.known();
    let view = &known.view;
    let (capacity_bytes, available_bytes) = render::capacity(view, None);
    Json(t::Status {
        metadata: known.words(),
        metadata_store: node.meta.describe(),
        version: env!("CARGO_PKG_VERSION").into(),
        node_id: node.id.to_string(),
        node: node.name.clone(),
        cluster: view.cluster.as_ref().map(|c| render::cluster(&c.record)),
        problem: node.problem(),
        data_plane: node.data_plane().words(),
        nodes: len(&view.nodes),
        nodes_live: u64::try_from(view.nodes.keys().filter(|id| view.live.contains_key(id)).count())
            .unwrap_or(0),
        stores: len(&view.stores),
        volumes: len(&view.volumes),
        exports: len(&view.exports),
        capacity_bytes,
        available_bytes,
    })
}

#[utoipa::path(post, path = "/v1/cluster/init", tag = "cluster", request_body = t::InitRequest,
    responses((status = 200, body = t::InitAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn init(State(node): Shared, Body(request): Body<t::InitRequest>) -> Answer<t::InitAnswer> {
    let id = ClusterId(uuid::Uuid::new_v4().into_bytes());
    let extent = request.extent_size_bytes.unwrap_or(DEFAULT_EXTENT_BYTES);
    let now = unix_s(SystemTime::now());
    let done = node.change(|view| ops::init(view, id, extent, now)).await?;
    Ok(Json(t::InitAnswer { cluster: render::cluster(&done.cluster), created: done.created }))
}

#[utoipa::path(get, path = "/v1/nodes", tag = "nodes",
    responses((status = 200, body = t::NodeList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn nodes(State(node): Shared) -> Answer<t::NodeList> {
    let known = known(&node)?;
    let view = &known.view;
    let mut nodes: Vec<_> =
        view.nodes.iter().map(|(id, n)| render::node_summary(view, *id, &n.record)).collect();
    nodes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(Json(t::NodeList { metadata: known.words(), nodes }))
}

/// `name` is a node's name or id, or `self` for the answering node.
#[utoipa::path(get, path = "/v1/nodes/{name}", tag = "nodes", params(("name" = String, Path, description = "Name or id of a node, or `self`")),
    responses((status = 200, body = t::Node), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn node(State(node): Shared, Path(name): Path<String>) -> Answer<t::Node> {
    let known = known(&node)?;
    let name = resolve_self(&node, &name);
    let (id, entry) = known.view.node(&name).ok_or_else(|| Refusal::no_node(&name))?;
    let map = (id == node.id).then(|| node.map()).flatten();
    let cores = map.as_ref().and_then(|map| Some(render::cores(&map.desired().ok()?.cores, &map.stats())));
    let mut answer = render::node(&known.view, id, &entry.record, cores);
    if let Some(observed) = map.and_then(|map| map.observed().ok()) {
        render::add_losses(&mut answer.links, &observed.links);
    }
    Ok(Json(t::Node { metadata: known.words(), ..answer }))
}

fn resolve_self(node: &Node, name: &str) -> String {
    if name == "self" { node.id.to_string() } else { name.to_owned() }
}

#[utoipa::path(get, path = "/v1/stores", tag = "stores",
    responses((status = 200, body = t::StoreList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn stores(State(node): Shared) -> Answer<t::StoreList> {
    let known = known(&node)?;
    Ok(Json(t::StoreList { metadata: known.words(), stores: render::stores(&known.view, None) }))
}

/// The node opens the path, and formats it if it is blank.
#[utoipa::path(post, path = "/v1/nodes/{name}/stores", tag = "stores", params(("name" = String, Path, description = "Name or id of a node, or `self`")),
    request_body = t::StoreRequest, responses((status = 202, body = t::Accepted), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn add_store(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<t::StoreRequest>,
) -> Result<(StatusCode, Json<t::Accepted>), ApiError> {
    let name = resolve_self(&node, &name);
    let spec = StoreSpec { path: request.path, size: request.size_bytes };
    ops::check_store(&spec)?;
    let here = known(&node)?.view.node(&name).is_some_and(|(id, _)| id == node.id);
    if here {
        // Only on its own machine can a node look before the record is written.
        checks::check_store_path(&spec)
            .map_err(|error| Refusal::new(RefusalKind::Invalid, "bad_store", error.to_string(), ""))?;
    }
    let id = node.change(|view| ops::add_store(view, &name, &spec)).await?;
    let message = format!("node {} opens {}", node.known().view.node_label(id), spec.path);
    Ok((StatusCode::ACCEPTED, Json(t::Accepted { message })))
}

/// Which store.
#[derive(Debug, Deserialize, IntoParams)]
pub(crate) struct WhichStore {
    /// Path or id of the store.
    store: String,
}

/// The node closes the store; what is on the disk stays there.
#[utoipa::path(delete, path = "/v1/nodes/{name}/stores", tag = "stores", params(("name" = String, Path, description = "Name or id of a node, or `self`"), WhichStore),
    responses((status = 202, body = t::Accepted), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn remove_store(
    State(node): Shared,
    Path(name): Path<String>,
    Query(which): Query<WhichStore>,
) -> Result<(StatusCode, Json<t::Accepted>), ApiError> {
    let name = resolve_self(&node, &name);
    let mut seen = false;
    node.change(|view| ops::remove_store(view, &name, &which.store, &mut seen)).await?;
    let message = format!("store {} is closed; what is on it stays there", which.store);
    Ok((StatusCode::ACCEPTED, Json(t::Accepted { message })))
}

#[utoipa::path(get, path = "/v1/volumes", tag = "volumes",
    responses((status = 200, body = t::VolumeList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn volumes(State(node): Shared) -> Answer<t::VolumeList> {
    let known = known(&node)?;
    Ok(Json(t::VolumeList { metadata: known.words(), volumes: render::volumes(&known.view) }))
}

fn volume_answer(known: &Known, name: &str) -> Result<t::VolumeAnswer, Refusal> {
    let (id, entry) = known.view.volume(name).ok_or_else(|| {
        let message = format!("there is no volume {name}");
        Refusal::new(RefusalKind::NotFound, "no_such_volume", message, "see `torusctl volume list`")
    })?;
    let volume = render::volume(&known.view, id, &entry.record);
    Ok(t::VolumeAnswer { metadata: known.words(), volume })
}

#[utoipa::path(get, path = "/v1/volumes/{name}", tag = "volumes", params(("name" = String, Path, description = "Name or id of a volume")),
    responses((status = 200, body = t::VolumeAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn volume(State(node): Shared, Path(name): Path<String>) -> Answer<t::VolumeAnswer> {
    Ok(Json(volume_answer(&*known(&node)?, &name)?))
}

/// Waits until the view fulfils a condition; the last one seen if it does not in time.
async fn wait_for(node: &Node, done: impl Fn(&View) -> bool) -> Arc<Known> {
    let mut known = node.subscribe();
    let waited = tokio::time::timeout(WAIT_LIMIT, known.wait_for(|known| done(&known.view))).await;
    drop(waited);
    node.known()
}

/// What the node of a volume says went wrong with it.
fn failure(view: &View, id: VolumeId) -> Option<String> {
    view.volume_report(id).filter(|report| report.state == "failed").map(|report| report.error.clone())
}

/// Waits until a volume is ready with its size, if asked to, and answers with it.
async fn settled(
    node: &Node,
    id: VolumeId,
    wait: bool,
    created: bool,
) -> Result<(StatusCode, Json<t::VolumeAnswer>), ApiError> {
    let ready = |view: &View| view.volumes.get(&id).is_some_and(|v| v.record.state == VolumeState::Ready);
    let known = if wait {
        wait_for(node, |view| ready(view) || failure(view, id).is_some() || !view.volumes.contains_key(&id))
            .await
    } else {
        node.known()
    };
    if let Some(error) = failure(&known.view, id).filter(|_| wait && !ready(&known.view)) {
        let hint =
            "the volume is recorded but not usable: see `torusctl node show`, then delete it or resize it";
        return Err(Refusal::new(RefusalKind::Conflict, "volume_failed", error, hint).into());
    }
    let answer = volume_answer(&known, &id.to_string())?;
    let status = match (ready(&known.view), created) {
        (false, _) => StatusCode::ACCEPTED,
        (true, true) => StatusCode::CREATED,
        (true, false) => StatusCode::OK,
    };
    Ok((status, Json(answer)))
}

/// The volume exists when this answers 201; after 202 it is still being made, look at its `state`.
#[utoipa::path(post, path = "/v1/volumes", tag = "volumes", params(Wait), request_body = t::VolumeRequest,
    responses((status = 201, body = t::VolumeAnswer), (status = 202, body = t::VolumeAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn create_volume(
    State(node): Shared,
    Query(wait): Query<Wait>,
    Body(request): Body<t::VolumeRequest>,
) -> Result<(StatusCode, Json<t::VolumeAnswer>), ApiError> {
    let new = NewVolume {
        id: VolumeId(uuid::Uuid::new_v4().into_bytes()),
        name: request.name,
        size: request.size_bytes,
        copies: request.copies,
        min_copies: request.min_copies,
        now_unix_s: unix_s(SystemTime::now()),
    };
    node.change(|view| ops::create_volume(view, &new)).await?;
    settled(&node, new.id, wait.asked(), true).await
}

/// Growing is always possible while there is space; shrinking needs `allow_data_loss` and no export.
#[utoipa::path(patch, path = "/v1/volumes/{name}", tag = "volumes", params(("name" = String, Path, description = "Name or id of a volume"), Wait), request_body = t::ResizeRequest,
    responses((status = 200, body = t::VolumeAnswer), (status = 202, body = t::VolumeAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn resize_volume(
    State(node): Shared,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
    Body(request): Body<t::ResizeRequest>,
) -> Result<(StatusCode, Json<t::VolumeAnswer>), ApiError> {
    node.change(|view| ops::resize_volume(view, &name, request.size_bytes, request.allow_data_loss)).await?;
    let id = node.known().view.volume(&name).map(|(id, _)| id);
    match id {
        Some(id) => settled(&node, id, wait.asked(), false).await,
        None => Ok((StatusCode::ACCEPTED, Json(volume_answer(&node.known(), &name)?))),
    }
}

/// The present head finishes what is in progress and hands over; requests wait for that moment. After 202 the move is on its way; after
/// 200 the named node is head.
#[utoipa::path(put, path = "/v1/volumes/{name}/head", tag = "volumes", params(("name" = String, Path, description = "Name or id of a volume"), Wait), request_body = t::MoveHeadRequest,
    responses((status = 200, body = t::VolumeAnswer), (status = 202, body = t::VolumeAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn move_head(
    State(node): Shared,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
    Body(request): Body<t::MoveHeadRequest>,
) -> Result<(StatusCode, Json<t::VolumeAnswer>), ApiError> {
    let to = resolve_self(&node, &request.node);
    let id = node.change(|view| moves::move_head(view, &name, &to)).await?;
    let target = node.known().view.node(&to).map(|(id, _)| id);
    let moving = |view: &View| {
        view.heads.get(&id).is_some_and(|h| h.record.move_to.is_some() && h.record.move_to == target)
    };
    let known = if wait.asked() { wait_for(&node, |view| !moving(view)).await } else { node.known() };
    let is_head = target.is_some() && known.view.serving_node(id) == target;
    if !is_head && !moving(&known.view) {
        let message = format!(
            "volume {name} has not moved: its head could not hand over, or {} was not fit any more",
            request.node
        );
        let hint = format!("see `torusctl volume show {name}` and repeat it");
        return Err(Refusal::new(RefusalKind::Conflict, "not_moved", message, hint).into());
    }
    let status = if is_head { StatusCode::OK } else { StatusCode::ACCEPTED };
    Ok((status, Json(volume_answer(&known, &id.to_string())?)))
}

/// There is no way back. The volume is gone when it is listed no more; `?wait` waits for that.
#[utoipa::path(delete, path = "/v1/volumes/{name}", tag = "volumes", params(("name" = String, Path, description = "Name or id of a volume"), Wait),
    responses((status = 200, body = t::Accepted), (status = 202, body = t::Accepted), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn delete_volume(
    State(node): Shared,
    Path(name): Path<String>,
    Query(wait): Query<Wait>,
) -> Result<(StatusCode, Json<t::Accepted>), ApiError> {
    let mut seen = None;
    let id = node.change(|view| ops::delete_volume(view, &name, &mut seen)).await?;
    let gone = |view: &View| !view.volumes.contains_key(&id);
    let known = if wait.asked() { wait_for(&node, gone).await } else { node.known() };
    Ok(if gone(&known.view) {
        (StatusCode::OK, Json(t::Accepted { message: format!("volume {name} is deleted") }))
    } else {
        let message = format!("volume {name} is being deleted");
        (StatusCode::ACCEPTED, Json(t::Accepted { message }))
    })
}

#[utoipa::path(get, path = "/v1/exports", tag = "exports",
    responses((status = 200, body = t::ExportList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn exports(State(node): Shared) -> Answer<t::ExportList> {
    let known = known(&node)?;
    Ok(Json(t::ExportList { metadata: known.words(), exports: render::exports(&known.view) }))
}

fn export_answer(known: &Known, address: Address) -> t::ExportAnswer {
    let entry = known.view.exports.get(&address);
    let export = entry.map(|export| render::export(&known.view, address, export));
    t::ExportAnswer { metadata: known.words(), export }
}

#[utoipa::path(get, path = "/v1/exports/{volume}", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    responses((status = 200, body = t::ExportAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn export(State(node): Shared, Path(volume): Path<String>) -> Answer<t::ExportAnswer> {
    let known = known(&node)?;
    if let Some((address, _)) = known.view.export(&volume) {
        return Ok(Json(export_answer(&known, address)));
    }
    let (_, entry) = known.view.volume(&volume).ok_or_else(|| {
        let message = format!("there is no volume {volume}");
        Refusal::new(RefusalKind::NotFound, "no_such_volume", message, "see `torusctl volume list`")
    })?;
    let answer = match entry.record.export {
        Some(address) => export_answer(&known, address),
        None => t::ExportAnswer { metadata: known.words(), export: None },
    };
    Ok(Json(answer))
}

/// An export that is there as asked for is left alone. After 202 it is not served yet, look at its `state`.
#[utoipa::path(post, path = "/v1/exports", tag = "exports", params(Wait), request_body = t::ExportRequest,
    responses((status = 201, body = t::ExportAnswer), (status = 202, body = t::ExportAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn create_export(
    State(node): Shared,
    Query(wait): Query<Wait>,
    Body(request): Body<t::ExportRequest>,
) -> Result<(StatusCode, Json<t::ExportAnswer>), ApiError> {
    let new = NewExport {
        volume: request.volume,
        address: request.address.map(|text| text.parse().map_err(Refusal::from)).transpose()?,
        interfaces: request.interfaces,
        read_only: request.read_only,
        policy: request.policy.as_ref().map(parse_policy).transpose().map_err(Refusal::from)?,
    };
    let address = node.change(|view| ops::export(view, &new)).await?;
    let state = |view: &View| view.exports.get(&address).map(|e| render::export(view, address, e).state);
    let serving = |view: &View| state(view).as_deref() == Some("serving");
    let known = if wait.asked() {
        wait_for(&node, |view| matches!(state(view).as_deref(), Some("serving" | "failed") | None)).await
    } else {
        node.known()
    };
    let status = if serving(&known.view) { StatusCode::CREATED } else { StatusCode::ACCEPTED };
    Ok((status, Json(export_answer(&known, address))))
}

/// The address is free again when the export is listed no more: its node has then confirmed that it serves it no longer.
#[utoipa::path(delete, path = "/v1/exports/{volume}", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume"), Wait),
    responses((status = 200, body = t::ExportAnswer), (status = 202, body = t::ExportAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn delete_export(
    State(node): Shared,
    Path(volume): Path<String>,
    Query(wait): Query<Wait>,
) -> Result<(StatusCode, Json<t::ExportAnswer>), ApiError> {
    let mut seen = None;
    let address = node.change(|view| ops::unexport(view, &volume, &mut seen)).await?;
    let gone = |view: &View| view.exports.get(&address).is_none_or(|e| !e.record.ending);
    let known = if wait.asked() { wait_for(&node, gone).await } else { node.known() };
    Ok(if gone(&known.view) {
        (StatusCode::OK, Json(t::ExportAnswer { metadata: known.words(), export: None }))
    } else {
        (StatusCode::ACCEPTED, Json(export_answer(&known, address)))
    })
}
