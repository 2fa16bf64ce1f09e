package spire

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"fmt"
	"math/big"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// webPKI is a private certificate authority, as PEM, and a certificate of it for each address: what https_web endpoints present.
func webPKI(t *testing.T, c *member, addresses ...string) (roots string, certs, keys []string) {
	t.Helper()
	key := func() *ecdsa.PrivateKey {
		k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return k
	}
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	caKey := key()
	sign := func(template *x509.Certificate, k *ecdsa.PrivateKey) []byte {
		der, err := x509.CreateCertificate(rand.Reader, template, ca, k.Public(), caKey)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	roots = pemFile(t, c, "web-roots.pem", "CERTIFICATE", sign(ca, caKey))
	for i, a := range addresses {
		k := key()
		der := sign(&x509.Certificate{SerialNumber: big.NewInt(int64(i + 2)), NotBefore: ca.NotBefore, NotAfter: ca.NotAfter, IPAddresses: []net.IP{net.ParseIP(a)},
			KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, k)
		private, err := x509.MarshalPKCS8PrivateKey(k)
		if err != nil {
			t.Fatal(err)
		}
		certs = append(certs, pemFile(t, c, fmt.Sprintf("web-%d.pem", i), "CERTIFICATE", der))
		keys = append(keys, pemFile(t, c, fmt.Sprintf("web-%d.key", i), "PRIVATE KEY", private))
	}
	return roots, certs, keys
}

// TestFederation: hansed and a stock spire-server, which know nothing of each other but their bundle endpoints, federate by either profile; roots
// that are announced on either side reach the other, and their workloads call each other by mTLS.
func TestFederation(t *testing.T) {
	t.Parallel()
	for _, profile := range []string{"https_spiffe", "https_web"} {
		t.Run(profile, func(t *testing.T) {
			t.Parallel()
			m := newMesh(t, map[string]kind{"west": ownAgents, "east": realSPIRE}, "west", "east")
			west, east := m.members[0], m.members[1]
			endpoint := "profile \"https_spiffe\" {}"
			fromEast, fromWest := []string{"--profile", profile}, "-bundleEndpointProfile "+profile
			ours := "https://" + west.ip(1) + ":7446"
			if profile == "https_web" {
				roots, certs, keys := webPKI(t, west, west.ip(1), east.ip(8))
				east.serverEnv = []string{"SSL_CERT_FILE=" + roots} // where Go looks for who vouches for web servers
				ours = "https://" + west.ip(1) + ":8446"
				fromEast = append(fromEast, "--web-roots", roots)
				west.web = fmt.Sprintf(", web: {listen: \"%s:8446\", certFile: %q, keyFile: %q}", west.ip(1), certs[0], keys[0])
				endpoint = fmt.Sprintf("profile \"https_web\" { serving_cert_file { cert_file_path = %q key_file_path = %q file_sync_interval = \"1h\" } }", certs[1], keys[1])
			}
			east.federates = fmt.Sprintf("federation { bundle_endpoint { address = %q port = 8443 refresh_hint = \"10s\" %s } }", east.ip(8), endpoint)
			east.agentSock = east.dir + "/w.sock"
			west.rootLife = "4m" // its refresh hint is 12 s then
			east.startSPIRE()
			host, port := east.serverAddress()
			east.spireAgent("spire-agent", east.agentSock, host, port)
			west.up("60s")
			west.sidecars()

			if profile == "https_spiffe" { // the first bundles go by hand
				l := *m.lab
				l.socket = east.spireAPI
				bundle := east.save("east.json", l.run("bundle show -format spiffe"))
				fromEast = append(fromEast, "--endpoint-id", "spiffe://"+east.td+"/spire/server", "--bundle", bundle)
				fromWest += " -endpointSpiffeID spiffe://" + west.td + "/hanse/control-plane -trustDomainBundleFormat spiffe -trustDomainBundlePath " +
					west.save("west.json", west.must("", "trust", "show", west.td, "-o", "bundle"))
			}
			west.must("", append([]string{"trust", "add", east.td, "--endpoint", "https://" + east.ip(8) + ":8443"}, fromEast...)...)
			east.spire("federation create -trustDomain "+west.td+" -bundleEndpointURL "+ours+" "+fromWest, west.td)

			self, err := os.Executable()
			if err != nil {
				t.Fatal(err)
			}
			east.spire(fmt.Sprintf("entry create -parentID spiffe://%s/node -spiffeID spiffe://%s/app -selector unix:path:%s -federatesWith spiffe://%s", east.td, east.td, self, west.td), "Entry ID")
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
			defer cancel()
			var app *workloadapi.X509Source
			m.eventually("east's workload has its SVID", func() error {
				short, cancel := context.WithTimeout(ctx, 15*time.Second)
				defer cancel()
				app, err = workloadapi.NewX509Source(short, workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+east.agentSock)))
				return err
			})
			defer app.Close()

			// call is a connection of east's workload to west's sidecar, in which each verifies the other. It returns the authorities of both.
			call := func() (rest [2]string, err error) {
				pay := spiffeid.RequireFromString("spiffe://" + west.td + "/ns/shop/sa/pay")
				config := tlsconfig.MTLSClientConfig(app, app, tlsconfig.AuthorizeID(pay))
				config.NextProtos = []string{"h2"}
				conn, err := (&tls.Dialer{Config: config}).DialContext(ctx, "tcp", west.ip(3)+":15008")
				if err != nil {
					return rest, err
				}
				defer conn.Close()
				if _, err := conn.Write([]byte("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")); err != nil {
					return rest, err
				}
				_ = conn.SetReadDeadline(time.Now().Add(5 * time.Second))
				if _, err = conn.Read(make([]byte, 9)); err != nil { // who refuses our SVID says so here
					return rest, err
				}
				own, err := app.GetX509SVID()
				if err != nil {
					return rest, err
				}
				theirs := conn.(*tls.Conn).ConnectionState().PeerCertificates[0]
				return [2]string{fmt.Sprintf("%x", own.Certificates[0].AuthorityKeyId), fmt.Sprintf("%x", theirs.AuthorityKeyId)}, nil
			}
			var before [2]string
			m.eventually("east's workload and west's sidecar accept each other", func() (err error) { before, err = call(); return err })

			authorities := func() (n int, err error) {
				out, err := west.hanse("", "trust", "show", east.td, "-o", "json")
				var row struct{ Authorities []string }
				if err == nil {
					err = json.Unmarshal([]byte(out), &row)
				}
				return len(row.Authorities), err
			}
			next := m.find(east.spire("localauthority x509 prepare"), `Authority ID: (\S+)`)
			m.eventually("spire-server's next root is at hansed, by the refresh hint", func() error {
				n, err := authorities()
				if err == nil && n != 2 {
					err = fmt.Errorf("%d authorities", n)
				}
				return err
			})
			east.spire("localauthority x509 activate -authorityID "+next, next)
			east.spire("localauthority x509 taint -authorityID "+before[0], before[0]) // agents renew what rests on it

			// hansed's next root waits until spire-server must have fetched it: it could not reach an endpoint that rests on one that it does not know.
			if out := west.must("", "trust", "rotate"); !strings.Contains(out, "everybody had loaded it") {
				t.Errorf("rotation: %s", out)
			}
			east.spire("federation refresh -id " + west.td)
			m.eventually("hansed's new root is at spire-server", func() error {
				out := east.spire("bundle list -id spiffe://"+west.td+" -format spiffe", "keys")
				var b struct{ Keys []struct{ Use string } }
				n := 0
				err := json.Unmarshal([]byte(out), &b)
				for _, k := range b.Keys {
					if k.Use == "x509-svid" {
						n++
					}
				}
				if err == nil && n != 2 {
					err = fmt.Errorf("%d X.509 authorities", n)
				}
				return err
			})
			m.eventually("they accept each other on the new roots of both", func() error {
				now, err := call()
				if err == nil && (now[0] != next || now[1] == before[1]) {
					err = fmt.Errorf("east's SVID rests on %s and west's on %s; before it was %v", now[0], now[1], before)
				}
				return err
			})
		})
	}
}
