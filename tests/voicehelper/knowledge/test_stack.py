"""`make up`: several processes share one Milvus Lite."""

import httpx

from tests.stack import Stack

from .conftest import eventually


def test_what_the_consumer_indexes_the_web_workers_find(tmp_path):
    stack = Stack(tmp_path)
    stack.start()
    try:
        with httpx.Client(
            base_url=f"http://127.0.0.1:{stack.env['WEB_PORT']}/api/v1",
            headers={"Authorization": f"Token {stack.token()}"},
            timeout=20,
        ) as client:
            files = {"file": ("animals.txt", b"Elephants are large.", "text/plain")}
            document = client.post("/documents", files=files).json()
            path = f"/documents/{document['id']}"
            eventually(lambda: client.get(path).json()["status"] == "indexed", "it is indexed", 60)

            def found() -> list[str]:
                answer = client.get("/search", params={"q": "large elephants"})
                return (
                    [one["document_id"] for one in answer.json()["results"]] if answer.status_code == 200 else ["away"]
                )

            for _ in range(6):  # of any of the web workers
                eventually(lambda: found() == [document["id"]], "it is found", 30)

            stack.child("milvus_lite").kill()
            eventually(lambda: found() == ["away"], "its end is noticed", 30)
            eventually(lambda: found() == [document["id"]], "it is started again, with what it had", 60)
            assert client.delete(path).status_code == 204
            assert found() == []
    finally:
        stack.end(15)
    stack.assert_nothing_is_left()
