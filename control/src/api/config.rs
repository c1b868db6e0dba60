//! Routes of the cluster's settings.

use axum::Json;
use axum::extract::State;

use super::error::{Body, Path};
use super::handlers::{Answer, Shared, known};
use super::types as t;
use crate::config::{self, Setting};
use crate::known::Known;

fn shown(known: &Known, setting: Setting) -> t::Setting {
    let value = setting.value(&known.view);
    t::Setting {
        name: setting.name().into(),
        value,
        words: setting.words(value),
        is_set: setting.set_value(&known.view).is_some(),
        default: setting.words(setting.default_value()),
        description: setting.description().into(),
    }
}

fn answer(known: &Known, setting: Setting) -> t::SettingAnswer {
    t::SettingAnswer { metadata: known.words(), setting: shown(known, setting) }
}

#[utoipa::path(get, path = "/v1/config", tag = "cluster",
    responses((status = 200, body = t::SettingList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn settings(State(node): Shared) -> Answer<t::SettingList> {
    let known = known(&node)?;
    let settings = Setting::ALL.into_iter().map(|setting| shown(&known, setting)).collect();
    Ok(Json(t::SettingList { metadata: known.words(), settings }))
}

#[utoipa::path(get, path = "/v1/config/{name}", tag = "cluster", params(("name" = String, Path, description = "Name of a setting")),
    responses((status = 200, body = t::SettingAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn setting(State(node): Shared, Path(name): Path<String>) -> Answer<t::SettingAnswer> {
    let setting = Setting::named(&name)?;
    Ok(Json(answer(&*known(&node)?, setting)))
}

/// All nodes follow at once. `default` takes the setting back.
#[utoipa::path(put, path = "/v1/config/{name}", tag = "cluster", params(("name" = String, Path, description = "Name of a setting")),
    request_body = t::SettingRequest,
    responses((status = 200, body = t::SettingAnswer), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn set_setting(
    State(node): Shared,
    Path(name): Path<String>,
    Body(request): Body<t::SettingRequest>,
) -> Answer<t::SettingAnswer> {
    let setting = Setting::named(&name)?;
    let value = setting.parse(&request.value)?;
    node.change(|view| config::set(view, setting, value)).await?;
    Ok(Json(answer(&node.known(), setting)))
}
