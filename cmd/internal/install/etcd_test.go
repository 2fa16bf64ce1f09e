package install

import (
	"crypto/tls"
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"maps"
	"net"
	"testing"
	"time"

	"github.com/hanse-mesh/hanse/cmd/internal/chart"
)

// The certificate of the chart's own etcd serves each member as both sides of TLS, stays while it is good, and is renewed by the same CA.
func TestEtcdSecret(t *testing.T) {
	now := time.Now()
	names := []string{"localhost", "hanse-etcd-0.hanse-etcd.hanse-system.svc", "hanse-etcd-1.hanse-etcd.hanse-system.svc"}
	first, err := renewed(nil, names, now)
	if err != nil {
		t.Fatal(err)
	}
	handshake(t, first, first, names[2])
	if again, err := renewed(first, names, now.Add(etcdLife/2-24*time.Hour)); err != nil || !maps.Equal(first, again) {
		t.Errorf("it is made anew in the first half of its life: %v", err)
	}
	for what, next := range map[string]func() (map[string]any, error){
		"old": func() (map[string]any, error) { return renewed(first, names, now.Add(etcdLife/2+24*time.Hour)) },
		"more names": func() (map[string]any, error) {
			return renewed(first, append(names, "hanse-etcd-2.hanse-etcd.hanse-system.svc"), now)
		},
	} {
		second, err := next()
		if err != nil || second["tls.crt"] == first["tls.crt"] || second["ca.crt"] != first["ca.crt"] {
			t.Errorf("%s: it is not renewed by the same CA: %v", what, err)
		}
		if what == "more names" {
			handshake(t, second, first, "hanse-etcd-2.hanse-etcd.hanse-system.svc") // members take the new one at different times
		}
	}
	foreign := maps.Clone(first)
	delete(foreign, "ca.key")
	if _, err := renewed(foreign, append(names, "x"), now); err == nil {
		t.Error("a Secret without the CA's key is renewed")
	}
}

// The names are those of the members that the chart makes; a Secret of somebody's own is left to them.
func TestEtcdNames(t *testing.T) {
	for sets, want := range map[string]int{"etcd.replicas=3": 4, "etcd.replicas=3,etcd.tlsSecret=mine": 0, "etcd.endpoints={https://etcd:2379}": 0, "region=eu-1": 0} {
		values, err := chart.Merge(nil, []string{"cluster=west", "trustDomain=west.example", sets})
		if err != nil {
			t.Fatal(err)
		}
		objects, err := chart.Objects(chart.Options{Values: values})
		if err != nil {
			t.Fatal(err)
		}
		names := etcdNames(objects, chart.Namespace)
		if len(names) != want || want > 0 && names[3] != "hanse-etcd-2.hanse-etcd.hanse-system.svc" {
			t.Errorf("%s: %v", sets, names)
		}
	}
}

// handshake: server and client, by Secrets of theirs, trust each other.
func handshake(t *testing.T, server, client map[string]any, name string) {
	t.Helper()
	of := func(data map[string]any) (tls.Certificate, *x509.CertPool) {
		text := func(key string) []byte {
			b, err := base64.StdEncoding.DecodeString(data[key].(string))
			if err != nil {
				t.Fatal(err)
			}
			if block, _ := pem.Decode(b); block == nil {
				t.Fatalf("%s is no PEM", key)
			}
			return b
		}
		cert, err := tls.X509KeyPair(text("tls.crt"), text("tls.key"))
		if err != nil {
			t.Fatal(err)
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(text("ca.crt"))
		return cert, pool
	}
	serverCert, clients := of(server)
	clientCert, servers := of(client)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
			err = tls.Server(conn, &tls.Config{Certificates: []tls.Certificate{serverCert}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert}).Handshake()
		}
		done <- err
	}()
	conn, err := tls.DialWithDialer(&net.Dialer{Timeout: 10 * time.Second}, "tcp", l.Addr().String(), &tls.Config{Certificates: []tls.Certificate{clientCert}, RootCAs: servers, ServerName: name})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
