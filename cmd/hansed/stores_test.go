package main

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"
)

// A client certificate that was renewed on disk is used for the next connection to etcd, without a restart.
func TestEtcdCertificateIsReadAnew(t *testing.T) {
	dir := t.TempDir()
	c := Etcd{CertFile: filepath.Join(dir, "tls.crt"), KeyFile: filepath.Join(dir, "tls.key")}
	if _, err := etcdTLS(c); err == nil {
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
	config, err := etcdTLS(c)
	if err != nil {
		t.Fatal(err)
	}
	second := issue(2)
	if got, err := config.GetClientCertificate(nil); err != nil || !bytes.Equal(got.Certificate[0], second) {
		t.Errorf("the one before is used: %v", err)
	}
}
