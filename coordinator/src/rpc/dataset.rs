//! `cairn.v1.DatasetService`.
use cairn_proto::convert;
use cairn_proto::limits::DATASET_CHUNKS_MAX;
use cairn_proto::v1;
use cairn_proto::v1::dataset_service_server::DatasetService;
use tonic::{Request, Response, Status};

use super::auth::caller;
use super::pages;
use crate::app::App;
use crate::db::datasets::{ChunkRow, DatasetRow, SetKind};
use crate::error::Error;
use crate::ids::RequestId;
use crate::ops::create_dataset::{NewDataset, create_dataset};
use crate::ops::read_datasets::{get_dataset, list_datasets};

/// The service.
pub struct Datasets(pub App);

#[tonic::async_trait]
impl DatasetService for Datasets {
    async fn create_dataset(
        &self,
        request: Request<v1::CreateDatasetRequest>,
    ) -> Result<Response<v1::CreateDatasetResponse>, Status> {
        let caller = caller(&request)?;
        let new = new_dataset(request.into_inner())?;
        let dataset = Some(to_wire(create_dataset(&self.0, &caller, new).await?));
        Ok(Response::new(v1::CreateDatasetResponse { dataset }))
    }

    async fn get_dataset(
        &self,
        request: Request<v1::GetDatasetRequest>,
    ) -> Result<Response<v1::GetDatasetResponse>, Status> {
        let caller = caller(&request)?;
        let (row, chunks) = get_dataset(&self.0, &caller, &request.get_ref().name).await?;
        Ok(Response::new(v1::GetDatasetResponse {
            dataset: Some(to_wire(row)),
            chunks: chunks.into_iter().map(chunk_to_wire).collect(),
        }))
    }

    async fn list_datasets(
        &self,
        request: Request<v1::ListDatasetsRequest>,
    ) -> Result<Response<v1::ListDatasetsResponse>, Status> {
        caller(&request)?;
        let request = request.into_inner();
        let size = pages::page_size(request.page_size)?;
        let after = pages::after(&request.page_token)?;
        let rows = list_datasets(&self.0, &after, size + 1).await?;
        let (rows, next_page_token) = pages::cut(rows, size, |row| row.name.clone());
        let datasets = rows.into_iter().map(to_wire).collect();
        Ok(Response::new(v1::ListDatasetsResponse {
            datasets,
            next_page_token,
        }))
    }
}

fn new_dataset(request: v1::CreateDatasetRequest) -> Result<NewDataset, Error> {
    if request.chunks.len() > DATASET_CHUNKS_MAX {
        return Err(Error::invalid(
            "chunks",
            format!("at most {DATASET_CHUNKS_MAX}"),
        ));
    }
    let chunks = request.chunks.iter().map(|chunk| {
        let blob = convert::blob("chunks.blob", chunk.blob.as_ref())?;
        Ok(ChunkRow {
            blob,
            records: chunk.records,
        })
    });
    Ok(NewDataset {
        set: set_from_wire(request.set)?,
        chunks: chunks.collect::<Result<_, Error>>()?,
        request: RequestId::from_field("request_id", &request.request_id)?,
        name: request.name,
        license: request.license,
        source: request.source,
    })
}

fn set_from_wire(set: i32) -> Result<SetKind, Error> {
    match convert::set(set)? {
        v1::DatasetSet::Train => Ok(SetKind::Train),
        v1::DatasetSet::Gate => Ok(SetKind::Gate),
        v1::DatasetSet::Audit => Ok(SetKind::Audit),
        v1::DatasetSet::Dev => Ok(SetKind::Dev),
        v1::DatasetSet::Unspecified => Err(Error::invalid("set", "is missing")),
    }
}

/// A set as the wire spells it.
#[must_use]
pub const fn set_to_wire(set: SetKind) -> v1::DatasetSet {
    match set {
        SetKind::Train => v1::DatasetSet::Train,
        SetKind::Gate => v1::DatasetSet::Gate,
        SetKind::Audit => v1::DatasetSet::Audit,
        SetKind::Dev => v1::DatasetSet::Dev,
    }
}

/// A chunk as the wire spells it.
#[must_use]
pub fn chunk_to_wire(chunk: ChunkRow) -> v1::Chunk {
    v1::Chunk {
        blob: Some(chunk.blob.into()),
        records: chunk.records,
    }
}

fn to_wire(row: DatasetRow) -> v1::Dataset {
    v1::Dataset {
        name: row.name,
        set: set_to_wire(row.set).into(),
        license: row.license,
        source: row.source,
        records: row.records,
        bytes: row.bytes,
        created_ms: row.created.0,
    }
}
