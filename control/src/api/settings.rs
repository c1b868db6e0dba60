//! The routes of what initiators see of an export besides its blocks: config string, mask list, reservation, policy.
//!
//! Each is a resource of its own below its export, which is named by its volume or by its address. A change answers with
//! the resource as it is then.

use axum::Json;
use axum::extract::State;

use super::error::{Body, Path};
use super::handlers::{Answer, Shared, known};
use super::{render, types as t};
use crate::model::{Mac, ModelError};
use crate::node::Node;
use crate::ops::{self, Refusal};
use crate::settings::{ConfigString, ExportSettings, Policy, SettingError, Who, listed_macs};

/// What is set for an export now.
fn present(node: &Node, name: &str) -> Result<ExportSettings, Refusal> {
    let known = known(node)?;
    let (_, export) = ops::find_export(&known.view, name)?;
    Ok(export.record.settings.clone())
}

/// Changes what is set for an export; how it is afterwards.
async fn change(
    node: &Node,
    name: &str,
    change: impl Fn(&mut ExportSettings) -> Result<(), Refusal>,
) -> Result<ExportSettings, Refusal> {
    let mut after = ExportSettings::default();
    node.change(|view| {
        ops::set_export(view, name, |settings| {
            change(settings)?;
            after = settings.clone();
            Ok(())
        })
    })
    .await?;
    Ok(after)
}

fn parse_macs(macs: &[String]) -> Result<Vec<Mac>, SettingError> {
    listed_macs(macs.iter().map(|mac| mac.parse()).collect::<Result<Vec<_>, ModelError>>()?)
}

pub(super) fn parse_policy(policy: &t::Policy) -> Result<Policy, SettingError> {
    Ok(Policy {
        config: policy.config.parse()?,
        masks: policy.masks.parse()?,
        reserve: policy.reserve.parse()?,
    })
}

#[utoipa::path(get, path = "/v1/exports/{volume}/config-string", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    responses((status = 200, body = t::ConfigString), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn config_string(
    State(node): Shared,
    Path(volume): Path<String>,
) -> Answer<t::ConfigString> {
    let settings = present(&node, &volume)?;
    Ok(Json(t::ConfigString { config_string: settings.config_string.to_string() }))
}

/// What initiators read, test and may set with Query Config.
#[utoipa::path(put, path = "/v1/exports/{volume}/config-string", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::ConfigString, responses((status = 200, body = t::ConfigString), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn set_config_string(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::ConfigString>,
) -> Answer<t::ConfigString> {
    let string: ConfigString = request.config_string.parse().map_err(Refusal::from)?;
    let settings = change(&node, &volume, |settings| {
        settings.config_string = string.clone();
        Ok(())
    })
    .await?;
    Ok(Json(t::ConfigString { config_string: settings.config_string.to_string() }))
}

#[utoipa::path(get, path = "/v1/exports/{volume}/masks", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    responses((status = 200, body = t::MacList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn masks(State(node): Shared, Path(volume): Path<String>) -> Answer<t::MacList> {
    Ok(Json(render::macs(&present(&node, &volume)?.masks)))
}

/// Initiators that are not in the list get no answer at all; with an empty list all are answered.
#[utoipa::path(put, path = "/v1/exports/{volume}/masks", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::MacList, responses((status = 200, body = t::MacList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn set_masks(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::MacList>,
) -> Answer<t::MacList> {
    let macs = parse_macs(&request.macs).map_err(Refusal::from)?;
    let settings = change(&node, &volume, |settings| {
        settings.masks.clone_from(&macs);
        Ok(())
    })
    .await?;
    Ok(Json(render::macs(&settings.masks)))
}

/// Takes initiators out of the list and puts others in, in one step.
#[utoipa::path(patch, path = "/v1/exports/{volume}/masks", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::MacListEdit, responses((status = 200, body = t::MacList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn edit_masks(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::MacListEdit>,
) -> Answer<t::MacList> {
    let add = parse_macs(&request.add).map_err(Refusal::from)?;
    let remove = parse_macs(&request.remove).map_err(Refusal::from)?;
    let settings = change(&node, &volume, |settings| {
        let kept = settings.masks.iter().filter(|mac| !remove.contains(mac));
        settings.masks = listed_macs(kept.chain(&add).copied())?;
        Ok(())
    })
    .await?;
    Ok(Json(render::macs(&settings.masks)))
}

#[utoipa::path(get, path = "/v1/exports/{volume}/reservation", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    responses((status = 200, body = t::MacList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn reservation(State(node): Shared, Path(volume): Path<String>) -> Answer<t::MacList> {
    Ok(Json(render::macs(&present(&node, &volume)?.reserved_for)))
}

/// Initiators that are not in the list are refused reads and writes; with an empty list it is not reserved. Whoever holds
/// the reservation is not asked.
#[utoipa::path(put, path = "/v1/exports/{volume}/reservation", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::MacList, responses((status = 200, body = t::MacList), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn set_reservation(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::MacList>,
) -> Answer<t::MacList> {
    let macs = parse_macs(&request.macs).map_err(Refusal::from)?;
    let settings = change(&node, &volume, |settings| {
        settings.reserved_for.clone_from(&macs);
        Ok(())
    })
    .await?;
    Ok(Json(render::macs(&settings.reserved_for)))
}

#[utoipa::path(get, path = "/v1/exports/{volume}/policy", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    responses((status = 200, body = t::Policy), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn policy(State(node): Shared, Path(volume): Path<String>) -> Answer<t::Policy> {
    Ok(Json(render::policy(&present(&node, &volume)?.policy)))
}

/// Who may change the config string, the mask list and the reservation over AoE; what is not named is `none`.
#[utoipa::path(put, path = "/v1/exports/{volume}/policy", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::Policy, responses((status = 200, body = t::Policy), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn set_policy(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::Policy>,
) -> Answer<t::Policy> {
    let policy = parse_policy(&request).map_err(Refusal::from)?;
    let settings = change(&node, &volume, |settings| {
        settings.policy = policy.clone();
        Ok(())
    })
    .await?;
    Ok(Json(render::policy(&settings.policy)))
}

/// As PUT; what is not named stays.
#[utoipa::path(patch, path = "/v1/exports/{volume}/policy", tag = "exports", params(("volume" = String, Path, description = "Name or id of a volume, or its SHELF.SLOT")),
    request_body = t::PolicyEdit, responses((status = 200, body = t::Policy), (status = "default", body = t::ErrorBody)))]
pub(crate) async fn edit_policy(
    State(node): Shared,
    Path(volume): Path<String>,
    Body(request): Body<t::PolicyEdit>,
) -> Answer<t::Policy> {
    let who = |text: Option<String>| text.map(|text| text.parse::<Who>()).transpose().map_err(Refusal::from);
    let (config, masks, reserve) = (who(request.config)?, who(request.masks)?, who(request.reserve)?);
    let settings = change(&node, &volume, |settings| {
        let Policy { config: old_config, masks: old_masks, reserve: old_reserve } = &mut settings.policy;
        for (old, new) in [(old_config, &config), (old_masks, &masks), (old_reserve, &reserve)] {
            if let Some(new) = new {
                old.clone_from(new);
            }
        }
        Ok(())
    })
    .await?;
    Ok(Json(render::policy(&settings.policy)))
}
