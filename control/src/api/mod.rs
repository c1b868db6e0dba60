//! The HTTP/JSON API under `/v1`, on TCP and on a unix socket.
//!
//! Reads answer from what the node knows, and say how current that is (`metadata`). Changes go to the metadata store at once
//! and answer when this node has seen them. Every route is registered together with its OpenAPI description, so that the
//! document at `/v1/openapi.json` cannot miss one.

mod clients;
mod config;
mod error;
mod handlers;
mod metrics;
mod render;
mod scrubs;
mod settings;
pub mod types;

use std::sync::Arc;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::routing::get;
use tokio::net::{TcpListener, UnixListener};
use utoipa::OpenApi;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use crate::node::Node;

/// Longest request body in bytes.
const BODY_BYTES: usize = 64 << 10;

#[derive(OpenApi)]
#[openapi(info(
    title = "Torus",
    description = "Administers a cluster of Torus nodes: volumes, their exports over ATA over Ethernet, stores and nodes. \
                   Errors carry a stable code, a message and a hint.",
    license(name = "Apache-2.0", identifier = "Apache-2.0")
))]
struct Document;

fn parts() -> (Router<Arc<Node>>, utoipa::openapi::OpenApi) {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(handlers::version))
        .routes(routes!(handlers::openapi))
        .routes(routes!(handlers::status))
        .routes(routes!(handlers::init))
        .routes(routes!(config::settings))
        .routes(routes!(config::setting, config::set_setting))
        .routes(routes!(handlers::nodes))
        .routes(routes!(handlers::node))
        .routes(routes!(handlers::stores))
        .routes(routes!(handlers::add_store))
        .routes(routes!(handlers::remove_store))
        .routes(routes!(scrubs::scrub, scrubs::start_scrub, scrubs::stop_scrub))
        .routes(routes!(handlers::volumes, handlers::create_volume))
        .routes(routes!(handlers::volume, handlers::resize_volume, handlers::delete_volume))
        .routes(routes!(handlers::move_head))
        .routes(routes!(handlers::exports, handlers::create_export))
        .routes(routes!(handlers::export, handlers::delete_export))
        .routes(routes!(settings::config_string, settings::set_config_string))
        .routes(routes!(settings::masks, settings::set_masks, settings::edit_masks))
        .routes(routes!(settings::reservation, settings::set_reservation))
        .routes(routes!(clients::clients))
        .routes(routes!(settings::policy, settings::set_policy, settings::edit_policy))
        .routes(routes!(metrics::metrics))
        .split_for_parts()
}

/// The OpenAPI document.
#[must_use]
pub fn document() -> utoipa::openapi::OpenApi {
    parts().1
}

/// All routes for one node.
pub fn router(node: Arc<Node>) -> Router {
    let (router, _) = parts();
    router
        .route("/", get(handlers::root))
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(DefaultBodyLimit::max(BODY_BYTES))
        .with_state(node)
}

/// Serves until the process ends.
pub async fn serve_tcp(listener: TcpListener, router: Router) {
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the API on TCP has ended");
    }
}

/// Serves until the process ends.
pub async fn serve_unix(listener: UnixListener, router: Router) {
    if let Err(error) = axum::serve(listener, router).await {
        tracing::error!(%error, "the API on the unix socket has ended");
    }
}
