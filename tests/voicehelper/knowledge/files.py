"""Small PDFs, made by hand."""

import io
import zlib

from pypdf import PdfReader, PdfWriter
from pypdf.generic import DictionaryObject, NameObject, NumberObject

PLAIN = b"BT /F1 12 Tf 72 720 Td (%s) Tj ET"


def pdf(*pages: str) -> bytes:
    """A PDF with a line of ASCII on each page."""
    return pdf_of([PLAIN % page.encode() for page in pages])


def pdf_of(contents: list[bytes], *, kids: int = 1, is_packed: bool = False) -> bytes:
    """A PDF of these content streams, each a page; `kids`: how often the tree of pages names each of them."""
    count = len(contents)
    pages = [f"{3 + 2 * number} 0 R" for number in range(count)] * kids
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        f"<< /Type /Pages /Kids [{' '.join(pages)}] /Count {len(pages)} >>".encode(),
    ]
    font = b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>"
    for number, content in enumerate(contents):
        stream = zlib.compress(content, 9) if is_packed else content
        packing = b" /Filter /FlateDecode" if is_packed else b""
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents %d 0 R"
            b" /Resources << /Font << /F1 %s >> >> >>" % (4 + 2 * number, font)
        )
        objects.append(b"<< /Length %d%s >>\nstream\n%s\nendstream" % (len(stream), packing, stream))
    data, offsets = b"%PDF-1.4\n", []
    for number, body in enumerate(objects, start=1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    size = len(objects) + 1
    return data + (
        b"xref\n0 %d\n0000000000 65535 f \n%strailer << /Size %d /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF"
        % (size, table, size, len(data))
    )


def encrypted(data: bytes, password: str, *, says_aes: bool = False) -> bytes:
    """The PDF with a password; "" encrypts it, too, and anybody may read it.

    `says_aes`: it says that it is AES-128. What cannot decrypt that does not see that it is not.
    """
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(data)))
    writer.encrypt(user_password=password, owner_password="owner", algorithm="RC4-128")
    if says_aes:
        cipher = DictionaryObject({NameObject("/CFM"): NameObject("/AESV2"), NameObject("/Length"): NumberObject(16)})
        writer._encrypt_entry.update(
            {
                NameObject("/V"): NumberObject(4),
                NameObject("/R"): NumberObject(4),
                NameObject("/CF"): DictionaryObject({NameObject("/StdCF"): cipher}),
                NameObject("/StmF"): NameObject("/StdCF"),
                NameObject("/StrF"): NameObject("/StdCF"),
            }
        )
    packed = io.BytesIO()
    writer.write(packed)
    return packed.getvalue()
