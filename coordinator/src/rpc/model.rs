//! `cairn.v1.ModelService`.
use cairn_proto::convert;
use cairn_proto::limits::CHECKPOINT_FILES_MAX;
use cairn_proto::v1;
use cairn_proto::v1::model_service_server::ModelService;
use tonic::{Request, Response, Status};

use super::auth::caller;
use super::pages;
use crate::app::App;
use crate::db::models::FileRow;
use crate::error::Error;
use crate::folding::Spectra;
use crate::ids::RequestId;
use crate::ops::create_model::{NewModel, create_model};
use crate::ops::read_contributions::Marked;
use crate::ops::read_models::{ModelView, get_checkpoint, list_checkpoints, list_models};

/// The service.
pub struct Models(pub App);

#[tonic::async_trait]
impl ModelService for Models {
    async fn create_model(
        &self,
        request: Request<v1::CreateModelRequest>,
    ) -> Result<Response<v1::CreateModelResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        if request.files.len() > CHECKPOINT_FILES_MAX {
            return Err(Error::invalid("files", format!("at most {CHECKPOINT_FILES_MAX}")).into());
        }
        let new = NewModel {
            files: request
                .files
                .iter()
                .map(file_from_wire)
                .collect::<Result<_, _>>()?,
            request: RequestId::from_field("request_id", &request.request_id)?,
            name: request.name,
        };
        let model = Some(model_to_wire(create_model(&self.0, &caller, new).await?));
        Ok(Response::new(v1::CreateModelResponse { model }))
    }

    async fn list_models(
        &self,
        request: Request<v1::ListModelsRequest>,
    ) -> Result<Response<v1::ListModelsResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let after = pages::after(&request.page_token)?;
        let views = list_models(&self.0, &after, size + 1).await?;
        let (views, next_page_token) = pages::cut(views, size, |view| view.model.name.clone());
        let models = views.into_iter().map(model_to_wire).collect();
        Ok(Response::new(v1::ListModelsResponse {
            models,
            next_page_token,
        }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<v1::GetCheckpointRequest>,
    ) -> Result<Response<v1::GetCheckpointResponse>, Status> {
        let caller = caller(&request)?;
        let request = request.into_inner();
        let view = get_checkpoint(&self.0, &caller, &request.model, &request.revision).await?;
        Ok(Response::new(v1::GetCheckpointResponse {
            checkpoint: Some(checkpoint_to_wire(view.checkpoint, true)),
            files: view.files.into_iter().map(file_to_wire).collect(),
            stack_files: view.stack_files.into_iter().map(file_to_wire).collect(),
            signed_manifest: view.signed_manifest,
            adapter_files: view.adapter_files.into_iter().map(file_to_wire).collect(),
            compressed_files: view
                .compressed_files
                .into_iter()
                .map(file_to_wire)
                .collect(),
        }))
    }

    async fn list_checkpoints(
        &self,
        request: Request<v1::ListCheckpointsRequest>,
    ) -> Result<Response<v1::ListCheckpointsResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let below = match pages::after(&request.page_token)? {
            token if token.is_empty() => None,
            token => Some(
                token
                    .parse::<u32>()
                    .map_err(|_| Error::invalid("page_token", "not a token of this list"))?,
            ),
        };
        let rows = list_checkpoints(&self.0, &request.model, below, size + 1).await?;
        let (rows, next_page_token) = pages::cut(rows, size, |one| one.row.revision.to_string());
        let checkpoints = rows
            .into_iter()
            .map(|one| checkpoint_to_wire(one, false))
            .collect();
        Ok(Response::new(v1::ListCheckpointsResponse {
            checkpoints,
            next_page_token,
        }))
    }
}

fn file_from_wire(file: &v1::File) -> Result<FileRow, Error> {
    let is_sha256 = file.sha256.len() == 64
        && file
            .sha256
            .bytes()
            .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_sha256 {
        return Err(Error::invalid("files.sha256", "64 lowercase hex digits"));
    }
    Ok(FileRow {
        path: convert::relative_path(&file.path)?.to_owned(),
        blob: convert::blob("files.blob", file.blob.as_ref())?,
        sha256: file.sha256.clone(),
    })
}

/// A file as the wire spells it.
#[must_use]
pub fn file_to_wire(file: FileRow) -> v1::File {
    v1::File {
        path: file.path,
        blob: Some(file.blob.into()),
        sha256: file.sha256,
    }
}

fn model_to_wire(view: ModelView) -> v1::Model {
    v1::Model {
        name: view.model.name,
        head: Some(checkpoint_to_wire(view.head, false)),
        created_ms: view.model.created.0,
    }
}

/// A checkpoint as the wire spells it; with the spectrum of each module or the whole stack's alone.
#[must_use]
pub fn checkpoint_to_wire(one: Marked, modules: bool) -> v1::Checkpoint {
    let Marked { row, marks } = one;
    v1::Checkpoint {
        model: row.model,
        revision: row.revision,
        commit: row.commit.to_string(),
        parent_commit: row
            .parent
            .map(|commit| commit.to_string())
            .unwrap_or_default(),
        round_id: row.round.map(|round| round.to_string()).unwrap_or_default(),
        contributions: row.contributions,
        gate_loss: row.gate_loss,
        audit_loss: row.audit_loss,
        created_ms: row.created.0,
        spectrum_json: row
            .spectrum
            .map(|text| {
                if modules {
                    text
                } else {
                    without_modules(&text)
                }
            })
            .unwrap_or_default(),
        refold_of: row.refold_of.unwrap_or_default(),
        revoked: marks.revoked,
        replaced_by: marks.replaced_by.unwrap_or_default(),
    }
}

/// Lists name many checkpoints, and models have hundreds of modules.
fn without_modules(spectrum: &str) -> String {
    let Ok(mut spectra) = serde_json::from_str::<Spectra>(spectrum) else {
        return String::new();
    };
    spectra.modules.clear();
    serde_json::to_string(&spectra).unwrap_or_default()
}
