//! Images from URLs: the same downloads, and what is particular to the web.

use super::server::{Deed, Server, refuse};
use super::*;

fn url(server: &Server, path: &str) -> ImageRequest {
    request(&format!("{}{path}", server.url()))
}

#[tokio::test]
async fn an_image_is_got_from_a_url_in_parts_and_by_gets_alone() {
    let server = Server::of(image()).await;
    let mut stand = Stand::new();
    stand.store.part = 64 << 10;
    let fetched = stand.fetch(&url(&server, "/a.eif?X-Amz-Signature=secret")).await.unwrap();
    assert_eq!(fs::read(stand.store.path(&fetched.digest())).unwrap(), image());
    let asked = server.asked();
    assert!(asked.iter().all(|asked| asked.method == "GET" && asked.path == "/a.eif?X-Amz-Signature=secret"));
    assert!(asked.len() > 4 && asked[0].range == Some(0..1), "{asked:?}");
}

#[tokio::test]
async fn a_url_that_was_signed_anew_is_known_by_its_place_and_etag() {
    let server = Server::of(image()).await;
    let stand = Stand::new();
    let first = stand.fetch(&url(&server, "/a.eif?X-Amz-Signature=one")).await.unwrap();
    let before = server.asked().len();
    assert_eq!(stand.fetch(&url(&server, "/a.eif?X-Amz-Signature=two")).await.unwrap(), first);
    assert_eq!(server.asked().len(), before + 1, "one look");
}

#[tokio::test]
async fn a_refused_url_says_so_without_its_query() {
    let server = Server::with(image(), |_, _| refuse(403, "AccessDenied")).await;
    let stand = Stand::new();
    let failure = stand.fetch(&url(&server, "/a.eif?X-Amz-Signature=secret")).await.unwrap_err();
    assert!(failure.message.contains("/a.eif?… : ") || failure.message.contains("/a.eif?…"), "{failure}");
    assert!(failure.message.contains("403 AccessDenied: said so"), "{failure}");
    assert!(failure.remedy.as_ref().unwrap().contains("expired"), "{failure}");
    assert!(!failure.to_string().contains("secret"), "{failure}");
    assert_eq!(server.asked().len(), 1);
}

#[tokio::test]
async fn redirects_are_followed_a_few_times_and_to_no_place_that_is_not_encrypted() {
    let to = |location: &str| Deed::Refuse(302, "Found", vec![("location", location.to_owned())]);
    let server = Server::with(image(), move |asked, _| match asked.path.as_str() {
        "/a" => to("/b?x=1"),
        "/b?x=1" => Deed::Serve,
        "/round" => to("/round"),
        "/out" => to("http://images.example/a"),
        _ => refuse(404, "NoSuchKey"),
    })
    .await;
    let stand = Stand::new();
    stand.fetch(&url(&server, "/a")).await.unwrap();
    let failure = stand.fetch(&url(&server, "/round")).await.unwrap_err();
    assert!(failure.message.contains("more than 5 times"), "{failure}");
    let failure = stand.fetch(&url(&server, "/out")).await.unwrap_err();
    assert!(failure.message.contains("use https://"), "{failure}");
    let failure = stand.fetch(&url(&server, "/none")).await.unwrap_err();
    assert!(failure.message.contains("answered 404 NoSuchKey"), "{failure}");
}

#[tokio::test]
async fn a_server_that_is_not_there_or_speaks_no_tls_is_told() {
    let stand = Stand::new();
    let failure = stand.fetch(&request("http://127.0.0.1:1/a.eif")).await.unwrap_err();
    assert!(failure.message.contains("127.0.0.1:1 was not reached"), "{failure}");
    let server = Server::of(image()).await;
    let plain = server.url().replace("http://", "https://");
    let failure = stand.fetch(&request(&format!("{plain}/a.eif"))).await.unwrap_err();
    assert!(failure.remedy.as_ref().unwrap().contains("certificate"), "{failure}");
}

#[tokio::test]
async fn a_server_without_ranges_is_read_in_one_piece() {
    let server = Server::with(image(), |_, _| Deed::Whole).await;
    let stand = Stand::new();
    let fetched = stand.fetch(&url(&server, "/a.eif")).await.unwrap();
    assert_eq!(fs::read(stand.store.path(&fetched.digest())).unwrap(), image());
}

#[tokio::test]
async fn an_empty_file_is_told() {
    let server = Server::of(Vec::new()).await;
    let failure = Stand::new().fetch(&url(&server, "/a.eif")).await.unwrap_err();
    assert!(failure.message.contains("is empty"), "{failure}");
}
