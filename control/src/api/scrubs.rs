//! The routes of a store's scrub: begin, change its rate, stop, resume, and how far it is.
//!
//! What is asked for stands in a record, so that it outlives torusd and any node can be asked; the node that has the store
//! carries it out, and tells how far it is in its status.

use std::time::SystemTime;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;

use super::error::{ApiError, Body, Path};
use super::handlers::{Answer, Shared, known};
use super::{render, types as t};
use crate::known::Known;
use crate::node::unix_s;
use crate::ops::{self, Refusal, RefusalKind};
use crate::size;

fn answer(known: &Known, name: &str) -> Result<t::ScrubAnswer, Refusal> {
    let (id, store) = ops::find_store(&known.view, name)?;
    Ok(t::ScrubAnswer {
        metadata: known.words(),
        store: render::store(&known.view, store.record.node, &store.record.path, Some(id)),
    })
}

fn bytes_per_s(rate: t::ScrubRate) -> Result<u64, Refusal> {
    match rate {
        t::ScrubRate::Bytes(bytes) => Ok(bytes),
        t::ScrubRate::Text(text) => size::parse(text.strip_suffix("/s").unwrap_or(&text))
            .map_err(|error| Refusal::new(RefusalKind::Invalid, "bad_rate", error.to_string(), "")),
    }
}

/// The store with its scrub, as any node of the cluster knows it.
#[utoipa::path(get, path = "/v1/stores/{id}/scrub", tag = "stores", params(("id" = String, Path, description = "Id of a store, or its path if one node only has it")),
    responses((status = 200, body = t::ScrubAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn scrub(State(node): Shared, Path(id): Path<String>) -> Answer<t::ScrubAnswer> {
    Ok(Json(answer(&*known(&node)?, &id)?))
}

/// Begins a new run; while one runs, changes its rate if one is given. With `resume`, a run that was stopped goes on where
/// it was. The node begins when it has the store open.
#[utoipa::path(post, path = "/v1/stores/{id}/scrub", tag = "stores", params(("id" = String, Path, description = "Id of a store, or its path if one node only has it")),
    request_body = t::ScrubRequest, responses((status = 202, body = t::ScrubAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn start_scrub(
    State(node): Shared,
    Path(id): Path<String>,
    Body(request): Body<t::ScrubRequest>,
) -> Result<(StatusCode, Json<t::ScrubAnswer>), ApiError> {
    let rate = request.rate.map(bytes_per_s).transpose()?;
    let now = unix_s(SystemTime::now());
    let store = node.change(|view| ops::start_scrub(view, &id, rate, request.resume, now)).await?;
    Ok((StatusCode::ACCEPTED, Json(answer(&node.known(), &store.to_string())?)))
}

/// Stops the run; it can be resumed where it was.
#[utoipa::path(delete, path = "/v1/stores/{id}/scrub", tag = "stores", params(("id" = String, Path, description = "Id of a store, or its path if one node only has it")),
    responses((status = 202, body = t::ScrubAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn stop_scrub(
    State(node): Shared,
    Path(id): Path<String>,
) -> Result<(StatusCode, Json<t::ScrubAnswer>), ApiError> {
    let store = node.change(|view| ops::stop_scrub(view, &id)).await?;
    Ok((StatusCode::ACCEPTED, Json(answer(&node.known(), &store.to_string())?)))
}
