//! Nothing works without a token, and a role does what it may and no more.
use std::time::Duration;

use cairn_coordinator::caller::Role;
use cairn_proto::client::ClientError;
use cairn_proto::identity::new_key;
use cairn_proto::reason::ErrorReason::*;
use cairn_proto::v1;
use cairn_proto::v1::blob_service_client::BlobServiceClient;
use cairn_proto::v1::dataset_service_client::DatasetServiceClient;
use cairn_proto::v1::enrollment_service_client::EnrollmentServiceClient;
use cairn_proto::v1::model_service_client::ModelServiceClient;
use cairn_proto::v1::round_service_client::RoundServiceClient;
use cairn_proto::v1::volunteer_service_client::VolunteerServiceClient;
use cairn_proto::v1::work_service_client::WorkServiceClient;
use cairn_tests::adapters::honest;
use cairn_tests::cluster::{Cluster, Ready, status_reason};
use cairn_tests::member::{Member, refusal, request_id};
use cairn_tests::tiny::{self, round_file};
use tonic::metadata::{Ascii, MetadataValue};
use tonic::service::interceptor::InterceptedService;
use tonic::transport::Channel;
use tonic::{Request, Status};

/// Every method of every service but the three that sign on, with this header.
async fn every_method(channel: Channel, header: Option<MetadataValue<Ascii>>) -> Vec<Status> {
    let channel = InterceptedService::new(channel, move |mut request: Request<()>| {
        if let Some(header) = &header {
            request
                .metadata_mut()
                .insert("authorization", header.clone());
        }
        Ok(request)
    });
    let mut refused = Vec::new();
    macro_rules! refused {
        ($client:ident: $($method:ident($request:expr)),+ $(,)?) => {{
            let mut client = $client::new(channel.clone());
            $(refused.push(client.$method($request).await.map(|_| ()).expect_err("it needs a session"));)+
        }};
    }
    refused!(EnrollmentServiceClient: create_join_token(v1::CreateJoinTokenRequest::default()));
    refused!(BlobServiceClient:
        find_missing_blobs(v1::FindMissingBlobsRequest::default()),
        query_write_status(v1::QueryWriteStatusRequest::default()),
        write_blob(futures::stream::iter([v1::WriteBlobRequest::default()])),
        read_blob(v1::ReadBlobRequest::default()),
    );
    refused!(DatasetServiceClient:
        create_dataset(v1::CreateDatasetRequest::default()),
        get_dataset(v1::GetDatasetRequest::default()),
        list_datasets(v1::ListDatasetsRequest::default()),
    );
    refused!(ModelServiceClient:
        create_model(v1::CreateModelRequest::default()),
        list_models(v1::ListModelsRequest::default()),
        get_checkpoint(v1::GetCheckpointRequest::default()),
        list_checkpoints(v1::ListCheckpointsRequest::default()),
    );
    refused!(RoundServiceClient:
        create_round(v1::CreateRoundRequest::default()),
        get_round(v1::GetRoundRequest::default()),
        list_rounds(v1::ListRoundsRequest::default()),
        watch_round(v1::WatchRoundRequest::default()),
        abort_round(v1::AbortRoundRequest::default()),
    );
    refused!(VolunteerServiceClient:
        get_standing(v1::GetStandingRequest::default()),
        list_submissions(v1::ListSubmissionsRequest::default()),
    );
    refused!(WorkServiceClient:
        claim_work(v1::ClaimWorkRequest::default()),
        renew_lease(v1::RenewLeaseRequest::default()),
        release_lease(v1::ReleaseLeaseRequest::default()),
        submit_adapter(v1::SubmitAdapterRequest::default()),
        submit_scores(v1::SubmitScoresRequest::default()),
    );
    refused
}

#[tokio::test]
async fn nothing_works_without_a_session() {
    let cluster = Cluster::start().await.unwrap();
    let invented = format!("Bearer cairn_session_{}", "0".repeat(64));
    for header in [
        None,
        Some("Bearer "),
        Some("Basic eve:eve"),
        Some(invented.as_str()),
    ] {
        let header: Option<MetadataValue<Ascii>> = header.map(|header| header.parse().unwrap());
        let refused = every_method(cluster.channel().await.unwrap(), header.clone()).await;
        assert_eq!(refused.len(), 24);
        for status in refused {
            assert_eq!(
                status_reason(Err::<(), _>(status)),
                Unauthenticated,
                "{header:?}"
            );
        }
    }
}

#[tokio::test]
async fn tokens_end_by_time_and_by_use_and_cannot_be_made_up() {
    let ready = Ready::start().await.unwrap();
    let hour = Duration::from_hours(1);
    let enroll = async |token: &str| {
        let key = new_key().unwrap();
        ready.cluster.enroll(token, &key, "bob").await
    };
    let url = ready.url(v1::Role::Volunteer, 2, hour).await.unwrap();
    let token = url.token.secret();
    let bob = enroll(token).await.unwrap();
    assert_eq!(bob.role(), v1::Role::Volunteer);
    enroll(token).await.unwrap();
    assert_eq!(status_reason(enroll(token).await), TokenSpent);

    let url = ready.url(v1::Role::Maintainer, 1, hour).await.unwrap();
    ready.cluster.advance(hour);
    assert_eq!(
        status_reason(enroll(url.token.secret()).await),
        TokenExpired
    );
    let last = if token.ends_with('0') { "1" } else { "0" };
    let guessed = format!("{}{last}", &token[..token.len() - 1]);
    for made_up in [&token[..10], &guessed, ""] {
        assert_eq!(
            status_reason(enroll(made_up).await),
            TokenUnknown,
            "{made_up}"
        );
    }
    // A year of tokens is not to be had, nor one for nobody.
    let refused = ready
        .maintainer
        .create_token(v1::Role::Volunteer, 1, 1 << 40)
        .await;
    assert_eq!(refusal(refused), InvalidArgument);
    let refused = ready
        .maintainer
        .create_token(v1::Role::Unspecified, 1, 1_000)
        .await;
    assert_eq!(refusal(refused), InvalidArgument);
}

#[tokio::test]
async fn a_session_that_ran_out_is_renewed_without_a_word() {
    let ready = Ready::start().await.unwrap();
    ready.cluster.advance(Duration::from_hours(7 * 24));
    assert!(ready.maintainer.checkpoint("").await.is_ok());
}

async fn refuses_maintenance(ready: &Ready, member: &Member, round: &str) {
    let make = member.create_token(v1::Role::Maintainer, 1, 1_000).await;
    assert_eq!(refusal(make), RoleRequired);
    let head = ready.maintainer.checkpoint("").await.unwrap();
    assert_eq!(
        refusal(member.create_model("mine", head.files).await),
        RoleRequired
    );
    let request = v1::CreateDatasetRequest {
        name: "mine".into(),
        set: v1::DatasetSet::Train.into(),
        license: "MIT".into(),
        chunks: ready.maintainer.dataset(tiny::TRAIN).await.unwrap().chunks,
        request_id: request_id(),
        ..Default::default()
    };
    let make = member.client.call(|mut to| {
        let request = request.clone();
        async move { to.datasets.create_dataset(request).await }
    });
    assert_eq!(refusal(make.await), RoleRequired);
    assert_eq!(
        refusal(member.open_round(&round_file(1)).await),
        RoleRequired
    );
    assert_eq!(refusal(member.abort(round).await), RoleRequired);
}

#[tokio::test]
async fn each_role_does_its_own_work_only() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, carol] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    refuses_maintenance(&ready, &bob, &round).await;
    refuses_maintenance(&ready, &ready.evaluator.member, &round).await;

    // Maintainers work on nothing, evaluators upload nothing, volunteers only under a lease.
    assert_eq!(refusal(ready.maintainer.claim().await), RoleRequired);
    assert_eq!(
        refusal(ready.evaluator.member.upload(b"x", "").await),
        RoleRequired
    );
    assert_eq!(refusal(bob.upload(b"x", "").await), InvalidArgument);
    let lease = bob.lease().await.unwrap();
    assert_eq!(refusal(carol.upload(b"x", &lease.id).await), LeaseLost);

    // Nobody evaluates but evaluators: not even with a lease of their own.
    let mut scores = v1::SubmitScoresRequest {
        request_id: request_id(),
        lease_id: lease.id.clone(),
        ..Default::default()
    };
    ready.evaluator.sign(&lease, &mut scores);
    let answer = bob.client.call(|mut to| {
        let scores = scores.clone();
        async move { to.work.submit_scores(scores).await }
    });
    assert_eq!(refusal(answer.await), RoleRequired);
}

#[tokio::test]
async fn the_gate_is_secret_and_adapters_are_their_makers() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, carol] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    for secret in [tiny::GATE, tiny::AUDIT] {
        let known = ready.maintainer.dataset(secret).await.unwrap().chunks;
        assert!(!known.is_empty());
        assert!(bob.dataset(secret).await.unwrap().chunks.is_empty());
        for chunk in known {
            let blob = chunk.blob.unwrap();
            // As if it did not exist, also for one who knows the digest.
            assert_eq!(refusal(bob.fetch(&blob).await), NotFound);
            let name = cairn_proto::convert::BlobName::try_from(&blob).unwrap();
            assert_eq!(bob.client.missing_blobs(&[name]).await.unwrap(), [name]);
            ready.evaluator.member.fetch(&blob).await.unwrap();
        }
    }
    let train = bob.dataset(tiny::TRAIN).await.unwrap().chunks;
    assert!(
        !bob.fetch(train[0].blob.as_ref().unwrap())
            .await
            .unwrap()
            .is_empty()
    );

    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    bob.hand_in(&lease, &adapter).await.unwrap();
    let blob = adapter.name().into();
    assert_eq!(refusal(carol.fetch(&blob).await), NotFound);
    assert_eq!(
        ready.evaluator.member.fetch(&blob).await.unwrap(),
        adapter.weights
    );
    assert!(carol.submissions().await.unwrap().is_empty());
}

#[tokio::test]
async fn a_stolen_session_token_is_no_key() {
    // A session reads and asks; what counts is signed with the key that never left its machine.
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let thief = ready.cluster.volunteer("mallory").await.unwrap();
    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await.unwrap();
    let signed_by_thief = thief.submission(&lease, &adapter);
    let answer = bob.submit(&signed_by_thief).await;
    assert_eq!(refusal(answer), BadSignature);
    assert!(bob.submissions().await.unwrap().is_empty());
}

#[tokio::test]
async fn names_are_one_line_of_print() {
    let cluster = Cluster::start().await.unwrap();
    for name in ["", "  ", "two\nlines", "\u{1b}[31mred", &"x".repeat(65)] {
        let token = cluster.token(Role::Volunteer).await.unwrap();
        let answer = cluster.enroll(&token, &new_key().unwrap(), name).await;
        assert_eq!(status_reason(answer), InvalidArgument, "{name:?}");
    }
}

#[tokio::test]
async fn a_key_of_another_coordinator_is_unknown() {
    let (here, there) = (
        Cluster::start().await.unwrap(),
        Cluster::start().await.unwrap(),
    );
    let bob = there.volunteer("bob").await.unwrap();
    let stranger = here.connect(bob.client.identity().clone()).await.unwrap();
    let error: ClientError = stranger.claim().await.unwrap_err();
    assert_eq!(error.reason(), Some(KeyUnknown));
}
