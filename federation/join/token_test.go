package join_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/hanse-mesh/hanse/federation/join"
)

func root(t testing.TB) *x509.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func token(t testing.TB) *join.Token {
	tok, err := join.NewToken(time.Unix(1_800_000_000, 0).UTC(), []string{"127.0.1.1:7443", "west.example:7443"}, []*x509.Certificate{root(t), root(t)})
	if err != nil {
		t.Fatal(err)
	}
	return tok
}

func TestTokenComesBack(t *testing.T) {
	want := token(t)
	s := want.Encode()
	for _, pasted := range []string{s, " " + s + "\n", s[:40] + "\r\n  " + s[40:]} {
		got, err := join.DecodeToken(pasted)
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, got); diff != "" {
			t.Fatal(diff)
		}
	}
}

// TestEveryChangedCharacterIsNoticed also covers a cut and an added one.
func TestEveryChangedCharacterIsNoticed(t *testing.T) {
	s := token(t).Encode()
	try := func(changed string) {
		t.Helper()
		if _, err := join.DecodeToken(changed); !errors.Is(err, join.ErrTampered) {
			t.Fatalf("%q: %v", changed, err)
		}
	}
	for i := range s {
		c := byte('A')
		if s[i] == c {
			c = 'B'
		}
		try(s[:i] + string(c) + s[i+1:])
		try(s[:i] + s[i+1:])
		try(s[:i] + "x" + s[i:])
	}
	try("")
	try("hns1_")
	try(strings.Repeat("hns1_", 10_000))
}

func TestTokenDoesNotShowItsSecret(t *testing.T) {
	tok := token(t)
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Info("created", "token", tok)
	secret := fmt.Sprintf("%x", tok.Secret)
	for _, s := range []string{log.String(), fmt.Sprint(tok), fmt.Sprintf("%v %+v %s", tok, tok, tok)} {
		if strings.Contains(s, secret) || strings.Contains(s, fmt.Sprint(tok.Secret)) || strings.Contains(s, tok.Encode()[5:]) {
			t.Errorf("%s shows the secret", s)
		}
	}
}

func FuzzDecodeToken(f *testing.F) {
	f.Add(token(f).Encode())
	f.Add("hns1_")
	f.Fuzz(func(t *testing.T, s string) {
		tok, err := join.DecodeToken(s)
		if err != nil {
			if !errors.Is(err, join.ErrTampered) {
				t.Fatalf("%q: %v", s, err)
			}
			return
		}
		again, err := join.DecodeToken(tok.Encode())
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(tok, again); diff != "" {
			t.Fatal(diff)
		}
	})
}
