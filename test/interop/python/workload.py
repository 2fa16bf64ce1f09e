"""Two workloads of two joined trust domains, which know the SPIFFE Workload API and nothing of Hanse.

HANSE_WEST and HANSE_EAST are the sockets of west's client and of east's server; HANSE_ROTATE is the command that rotates west's root.
"""
import contextlib
import os
import shlex
import socket
import ssl
import subprocess
import tempfile
import threading
import time
import unittest

from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from spiffe import JwtSource, JwtSvid, SpiffeId, TrustDomain, WorkloadApiClient, X509Source
from spiffe.errors import PySpiffeError
from spiffe.workloadapi.errors import FetchJwtSvidError, ValidateJwtSvidError

WEST, EAST = TrustDomain("west.test"), TrustDomain("east.test")
CLIENT, SERVER = "spiffe://west.test/ns/shop/sa/client", "spiffe://east.test/ns/shop/sa/server"
TIMEOUT = 10


def spki(key):
    return key.public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def issuer(context, svid):
    """The authority of the workload's own bundle that signed its SVID."""
    for authority in context.x509_bundle_set.get_bundle_for_trust_domain(svid.spiffe_id.trust_domain).x509_authorities:
        with contextlib.suppress(Exception):
            svid.leaf.verify_directly_issued_by(authority)
            return authority
    raise AssertionError(f"nothing in its bundle signed the SVID {svid.leaf.serial_number:x}")


def tls(side, context, trusted):
    """A configuration with a workload's SVID that trusts one of the bundles that it was given."""
    config = ssl.SSLContext(side)
    config.check_hostname, config.verify_mode = False, ssl.CERT_REQUIRED
    bundle = context.x509_bundle_set.get_bundle_for_trust_domain(trusted)
    config.load_verify_locations(cadata=b"".join(c.public_bytes(Encoding.DER) for c in bundle.x509_authorities))
    with tempfile.TemporaryDirectory() as folder:
        chain, key = os.path.join(folder, "chain.pem"), os.path.join(folder, "key.pem")
        context.default_svid.save(chain, key, Encoding.PEM)
        config.load_cert_chain(chain, key)
    return config


def call(client, server, client_trusts=EAST, server_trusts=WEST):
    """What each end of a TLS connection says of the other: its SPIFFE ID, or the error."""
    a, b = socket.socketpair()
    a.settimeout(TIMEOUT), b.settimeout(TIMEOUT)
    said = {}

    def end(name, conn, config, is_server):
        try:
            with config.wrap_socket(conn, server_side=is_server) as s:
                s.sendall(b"x")
                s.recv(1)
                said[name] = [v for k, v in s.getpeercert()["subjectAltName"] if k == "URI"][0]
        except OSError as error:
            said[name] = error
        finally:
            conn.close()

    far = threading.Thread(target=end, args=("client", b, tls(ssl.PROTOCOL_TLS_SERVER, server, server_trusts), True))
    far.start()
    end("server", a, tls(ssl.PROTOCOL_TLS_CLIENT, client, client_trusts), False)
    far.join()
    return said["client"], said["server"]


class Follower:
    """Every context that a source is given, each of which must be whole."""

    def __init__(self, source):
        self.source, self.serials, self.faults = source, [], []
        source.subscribe_for_updates(self.look)
        self.look()

    def look(self):
        context = self.source.get_x509_context()
        svid = context.default_svid
        if svid.leaf.serial_number not in self.serials:
            self.serials.append(svid.leaf.serial_number)
        try:
            issuer(context, svid)
        except AssertionError as fault:
            self.faults.append(str(fault))


class Workloads(unittest.TestCase):
    def setUp(self):
        self.opened = contextlib.ExitStack()
        self.addCleanup(self.opened.close)
        self.west, self.east = (self.opened.enter_context(WorkloadApiClient(os.environ[name], default_timeout=TIMEOUT))
                                for name in ("HANSE_WEST", "HANSE_EAST"))

    def source(self, kind, client):
        return self.opened.enter_context(kind(workload_api_client=client, timeout_in_seconds=TIMEOUT))

    def eventually(self, what, check):
        deadline = time.monotonic() + 20
        while not check():
            self.assertLess(time.monotonic(), deadline, f"{what}: not within 20 s")
            time.sleep(0.05)

    def test_x509_svid(self):
        for client, want in (self.west, CLIENT), (self.east, SERVER):
            svid, = client.fetch_x509_svids()
            self.assertEqual(str(svid.spiffe_id), want)
            self.assertEqual(spki(svid.private_key.public_key()), spki(svid.leaf.public_key()))
            context = client.fetch_x509_context()
            issuer(context, context.default_svid)

    def test_x509_bundles(self):
        at_west, at_east = self.west.fetch_x509_bundles(), self.east.fetch_x509_bundles()
        for domain in WEST, EAST:
            bundle = at_west.get_bundle_for_trust_domain(domain)
            self.assertTrue(bundle.x509_authorities)
            self.assertEqual(bundle.x509_authorities, at_east.get_bundle_for_trust_domain(domain).x509_authorities)
        self.assertEqual(len(at_west.bundles), 2)
        in_context = self.west.fetch_x509_context().x509_bundle_set
        self.assertEqual(in_context.get_bundle_for_trust_domain(EAST).x509_authorities, at_east.get_bundle_for_trust_domain(EAST).x509_authorities)

    def test_mutual_tls(self):
        west, east = self.west.fetch_x509_context(), self.east.fetch_x509_context()
        self.assertEqual(call(west, east), (CLIENT, SERVER))
        _, at_client = call(west, east, client_trusts=WEST)
        self.assertIsInstance(at_client, ssl.SSLCertVerificationError)
        at_server, _ = call(west, east, server_trusts=EAST)
        self.assertIsInstance(at_server, ssl.SSLCertVerificationError)

    def test_jwt_svid(self):
        for here, own, there, audience in (self.west, CLIENT, self.east, SERVER), (self.east, SERVER, self.west, CLIENT):
            token = here.fetch_jwt_svid({audience}).token
            svid = there.validate_jwt_svid(token, audience)
            self.assertEqual((str(svid.spiffe_id), svid.audience), (own, {audience}))
            bundle = self.source(JwtSource, there).get_bundle_for_trust_domain(svid.spiffe_id.trust_domain)
            self.assertEqual(str(JwtSvid.parse_and_validate(token, bundle, {audience}).spiffe_id), own)

            with self.assertRaisesRegex(ValidateJwtSvidError, "INVALID_ARGUMENT"):
                there.validate_jwt_svid(token, own)  # for another audience
            with self.assertRaises(PySpiffeError):
                JwtSvid.parse_and_validate(token, bundle, {own})
            header, claims, _ = token.split(".")
            signature = here.fetch_jwt_svid({"another"}).token.split(".")[2]
            with self.assertRaisesRegex(ValidateJwtSvidError, "INVALID_ARGUMENT"):
                there.validate_jwt_svid(".".join((header, claims, signature)), audience)
            with self.assertRaisesRegex(FetchJwtSvidError, "PERMISSION_DENIED"):
                here.fetch_jwt_svid({audience}, subject=SpiffeId(own + "/another"))

    def test_jwt_bundles(self):
        at_west, at_east = self.west.fetch_jwt_bundles(), self.east.fetch_jwt_bundles()
        for domain in WEST, EAST:
            here, there = ({k: spki(v) for k, v in b.get_bundle_for_trust_domain(domain).jwt_authorities.items()} for b in (at_west, at_east))
            self.assertTrue(here)
            self.assertEqual(here, there)

    def test_renewal(self):
        seen = Follower(self.source(X509Source, self.west))
        self.eventually("renewal", lambda: len(seen.serials) > 1)
        self.assertEqual(seen.faults, [])

    def test_rotation(self):
        """West's root is replaced under two sources that stay open."""
        west, east = self.source(X509Source, self.west), self.source(X509Source, self.east)
        keys = self.source(JwtSource, self.east)
        seen = Follower(west)
        known = set(keys.get_bundle_for_trust_domain(WEST).jwt_authorities)
        context = west.get_x509_context()
        old = issuer(context, context.default_svid)
        subprocess.run(shlex.split(os.environ["HANSE_ROTATE"]), check=True, timeout=60, stdout=subprocess.DEVNULL)

        def signed_anew():
            context = west.get_x509_context()
            return issuer(context, context.default_svid) != old

        self.eventually("an SVID by the new root", signed_anew)
        self.assertGreater(len(seen.serials), 1)
        self.assertEqual(seen.faults, [])
        self.assertEqual(call(west.get_x509_context(), east.get_x509_context()), (CLIENT, SERVER))
        added = set(keys.get_bundle_for_trust_domain(WEST).jwt_authorities) - known
        self.assertTrue(added, "a JWT key of the new root at east")
        token = self.west.fetch_jwt_svid({SERVER, "after the rotation"}).token
        svid = JwtSvid.parse_and_validate(token, keys.get_bundle_for_trust_domain(WEST), {SERVER})
        self.assertEqual(str(svid.spiffe_id), CLIENT)


if __name__ == "__main__":
    unittest.main(verbosity=2)
