package main

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"log/slog"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/hanse-mesh/hanse/federation/etcd"
)

// A client certificate that was renewed on disk is used for the next connection to etcd, without a restart.
func TestEtcdCertificateIsReadAnew(t *testing.T) {
	dir := t.TempDir()
	c := Etcd{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	if _, _, err := etcdTLS(c); err == nil {
		t.Error("files that are not there are no fault")
	}
	issue := func(serial int64) []byte {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template := &x509.Certificate{SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour)}
		der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
		if err != nil {
			t.Fatal(err)
		}
		keyDER, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			t.Fatal(err)
		}
		for file, b := range map[string]*pem.Block{c.CertFile: {Type: "CERTIFICATE", Bytes: der}, c.KeyFile: {Type: "PRIVATE KEY", Bytes: keyDER}} {
			if err := os.WriteFile(file, pem.EncodeToMemory(b), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		return der
	}
	issue(1)
	config, _, err := etcdTLS(c)
	if err != nil {
		t.Fatal(err)
	}
	second := issue(2)
	if got, err := config.GetClientCertificate(nil); err != nil || !bytes.Equal(got.Certificate[0], second) {
		t.Errorf("the one before is used: %v", err)
	}
}

// A CA that was replaced on disk is the one of the next connection to etcd: the server's certificate must be of it, and for the address that was
// dialled.
func TestEtcdCAIsReadAnew(t *testing.T) {
	file := filepath.Join(t.TempDir(), "ca.crt")
	type ca struct {
		cert *x509.Certificate
		key  *ecdsa.PrivateKey
	}
	sign := func(template *x509.Certificate, by *ca) *ca {
		t.Helper()
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		template.SerialNumber, template.NotBefore, template.NotAfter = big.NewInt(1), time.Now().Add(-time.Minute), time.Now().Add(time.Hour)
		if by == nil {
			template.IsCA, template.BasicConstraintsValid = true, true
			by = &ca{template, key}
		}
		der, err := x509.CreateCertificate(rand.Reader, template, by.cert, &key.PublicKey, by.key)
		if err != nil {
			t.Fatal(err)
		}
		cert, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		return &ca{cert, key}
	}
	write := func(cas ...*ca) {
		t.Helper()
		var out []byte
		for _, c := range cas {
			out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.cert.Raw})...)
		}
		if err := os.WriteFile(file, out, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	old, next := sign(&x509.Certificate{Subject: pkix.Name{CommonName: "old"}}, nil), sign(&x509.Certificate{Subject: pkix.Name{CommonName: "next"}}, nil)
	server := func(ca *ca, ip string) tls.Certificate {
		c := sign(&x509.Certificate{IPAddresses: []net.IP{net.ParseIP(ip)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}, ca)
		return tls.Certificate{Certificate: [][]byte{c.cert.Raw}, PrivateKey: c.key}
	}
	var presents atomic.Pointer[tls.Certificate]
	g := grpc.NewServer(grpc.Creds(credentials.NewTLS(&tls.Config{GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return presents.Load(), nil }})))
	pb.RegisterKVServer(g, emptyKV{})
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = g.Serve(ln) }()
	defer g.Stop()

	write(old)
	config, roots, err := etcdTLS(Etcd{CAFile: file})
	if err != nil {
		t.Fatal(err)
	}
	dial := func(c tls.Certificate) error {
		presents.Store(&c)
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		x, err := etcd.DialExternal(ctx, etcd.ExternalConfig{Endpoints: []string{"https://" + ln.Addr().String()}, TLS: config, Roots: roots, Log: slog.New(slog.DiscardHandler)})
		if err != nil {
			return err
		}
		return x.Close()
	}
	check := func(when string, err error, want string) {
		t.Helper()
		if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
			t.Errorf("%s: %v, want %q", when, err, want)
		}
	}
	check("the CA of the start", dial(server(old, "127.0.0.1")), "")
	check("another CA", dial(server(next, "127.0.0.1")), "unknown authority")
	write(old, next)
	check("both, the next", dial(server(next, "127.0.0.1")), "")
	write(next)
	check("the next alone", dial(server(next, "127.0.0.1")), "")
	check("one of before", dial(server(old, "127.0.0.1")), "unknown authority")
	check("another address", dial(server(next, "127.0.0.2")), "127.0.0.2, not 127.0.0.1")
	write()
	check("a file without a certificate", dial(server(next, "127.0.0.1")), "no certificate in it")
}

// emptyKV has nothing.
type emptyKV struct{ pb.UnimplementedKVServer }

func (emptyKV) Txn(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error) {
	return &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: true}, nil
}

func (emptyKV) Range(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
	return &pb.RangeResponse{Header: &pb.ResponseHeader{Revision: 1}}, nil
}
