package install

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/base64"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"strconv"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/hanse-mesh/hanse/cmd/internal/admin"
)

const (
	etcdName   = "hanse-etcd" // of the chart's own etcd, and of its Secret if none is given
	etcdCALife = 10 * 365 * 24 * time.Hour
	etcdLife   = 2 * 365 * 24 * time.Hour // of the certificate, renewed by an upgrade in the second half
	etcdWarn   = 90 * 24 * time.Hour      // before its end, "hanse check" asks for that upgrade
)

// WithEtcdSecret puts the Secret of the chart's own etcd before the rest of the namespace, where objects want one that nobody else brings: the one that is there while it is good for
// long, else with a new certificate of the same CA.
func (c *Cluster) WithEtcdSecret(ctx context.Context, objects []*unstructured.Unstructured, now time.Time) ([]*unstructured.Unstructured, error) {
	names := etcdNames(objects, c.Namespace)
	if names == nil {
		return objects, nil
	}
	data, err := c.etcdSecret(ctx)
	if err != nil {
		return nil, err
	}
	if data, err = renewed(data, names, now); err != nil {
		return nil, fmt.Errorf("secret %s/%s: %w", c.Namespace, etcdName, err)
	}
	secret := &unstructured.Unstructured{Object: map[string]any{"apiVersion": "v1", "kind": "Secret", "type": "kubernetes.io/tls",
		"metadata": map[string]any{"name": etcdName, "namespace": c.Namespace, "labels": map[string]any{"app.kubernetes.io/part-of": "hanse"}}, "data": data}}
	i := slices.IndexFunc(objects, func(o *unstructured.Unstructured) bool { return o.GetNamespace() == c.Namespace })
	return slices.Insert(slices.Clone(objects), max(0, i), secret), nil
}

// etcdSecret is the data of the Secret, nil if there is none.
func (c *Cluster) etcdSecret(ctx context.Context) (map[string]any, error) {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	have, err := c.client.Resource(kinds["Secret"].GroupVersionResource).Namespace(c.Namespace).Get(ctx, etcdName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("secret %s/%s: %w", c.Namespace, etcdName, err)
	}
	data, _, _ := unstructured.NestedMap(have.Object, "data")
	return data, nil
}

// etcdNames are those by which the members of the chart's own etcd are reached; nil if there is none, or its Secret is another.
func etcdNames(objects []*unstructured.Unstructured, namespace string) []string {
	for _, o := range objects {
		if o.GetKind() != "StatefulSet" || o.GetName() != etcdName {
			continue
		}
		volumes, _, _ := unstructured.NestedSlice(o.Object, "spec", "template", "spec", "volumes")
		if !slices.ContainsFunc(volumes, func(v any) bool {
			m, _ := v.(map[string]any)
			s, _, _ := unstructured.NestedString(m, "secret", "secretName")
			return s == etcdName
		}) {
			return nil
		}
		replicas, _, _ := unstructured.NestedFieldNoCopy(o.Object, "spec", "replicas")
		n, _ := strconv.Atoi(fmt.Sprint(replicas)) // an int64 of an API server, a float64 of YAML
		names := []string{"localhost"}
		for i := range n {
			names = append(names, fmt.Sprintf("%s-%d.%s.%s.svc", etcdName, i, etcdName, namespace))
		}
		return names
	}
	return nil
}

// renewed is data with a certificate that is good for names and at least half of its life; data itself if it is so.
func renewed(data map[string]any, names []string, now time.Time) (map[string]any, error) {
	if data == nil {
		ca := &x509.Certificate{Subject: pkix.Name{CommonName: "hanse etcd"}, NotBefore: now.Add(-maxSkew), NotAfter: now.Add(etcdCALife), IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true,
			KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature}
		cert, key, err := signed(ca, ca, nil)
		if err != nil {
			return nil, err
		}
		data = map[string]any{"ca.crt": cert, "ca.key": key}
	}
	der, err := part(data, "tls.crt")
	if err == nil {
		cert, err := x509.ParseCertificate(der)
		if err == nil && cert.NotAfter.Sub(now) > etcdLife/2 && !slices.ContainsFunc(names, func(n string) bool { return cert.VerifyHostname(n) != nil }) {
			return data, nil
		}
	}
	caDER, err1 := part(data, "ca.crt")
	keyDER, err2 := part(data, "ca.key")
	if err := errors.Join(err1, err2); err != nil {
		return nil, fmt.Errorf("it was not made by hanse install, or was changed since: %w; name your own by etcd.tlsSecret, or delete it and every Pod of hanse-etcd and hansed", err)
	}
	ca, err := x509.ParseCertificate(caDER)
	if err != nil {
		return nil, fmt.Errorf("ca.crt: %w", err)
	}
	caKey, err := x509.ParsePKCS8PrivateKey(keyDER)
	if err != nil {
		return nil, fmt.Errorf("ca.key: %w", err)
	}
	leaf := &x509.Certificate{Subject: pkix.Name{CommonName: etcdName}, NotBefore: now.Add(-maxSkew), NotAfter: now.Add(etcdLife), DNSNames: names, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1), net.IPv6loopback},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	cert, key, err := signed(leaf, ca, caKey)
	if err != nil {
		return nil, err
	}
	return map[string]any{"ca.crt": data["ca.crt"], "ca.key": data["ca.key"], "tls.crt": cert, "tls.key": key}, nil
}

// signed is a certificate and a key for it, as a Secret has them; by itself if there is no key of a parent.
func signed(template, parent *x509.Certificate, by any) (cert, key string, err error) {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", "", err
	}
	if by == nil {
		by = k
	}
	if template.SerialNumber, err = rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127)); err != nil {
		return "", "", err
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &k.PublicKey, by)
	if err != nil {
		return "", "", err
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(k)
	if err != nil {
		return "", "", err
	}
	text := func(kind string, der []byte) string {
		return base64.StdEncoding.EncodeToString(pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}))
	}
	return text("CERTIFICATE", der), text("PRIVATE KEY", keyDER), nil
}

// part is what one entry of a Secret's data encloses.
func part(data map[string]any, name string) ([]byte, error) {
	text, _ := data[name].(string)
	b, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	block, _ := pem.Decode(b)
	if block == nil {
		return nil, fmt.Errorf("%s: no PEM in it", name)
	}
	return block.Bytes, nil
}

// etcdCertificate checks that the certificate of the chart's own etcd is there and lasts.
func (c *Cluster) etcdCertificate(ctx context.Context, names []string, now time.Time) admin.Check {
	k := admin.Check{Name: "etcd certificate", Remedy: "hanse upgrade --context " + c.Context + " renews it"}
	data, err := c.etcdSecret(ctx)
	switch {
	case apierrors.IsForbidden(err):
		k.Warn, k.Detail, k.Remedy = true, err.Error(), "you may not get Secrets in "+c.Namespace
		return k
	case err != nil:
		k.Detail = err.Error()
		return k
	case data == nil:
		k.Detail = "there is no Secret " + etcdName
		return k
	}
	der, err := part(data, "tls.crt")
	if err != nil {
		k.Detail = err.Error()
		return k
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		k.Detail = "tls.crt: " + err.Error()
		return k
	}
	for _, n := range names {
		if err := cert.VerifyHostname(n); err != nil {
			k.Detail = err.Error()
			return k
		}
	}
	k.Detail = "until " + cert.NotAfter.Format(time.DateOnly)
	k.OK, k.Warn = cert.NotAfter.Sub(now) > etcdWarn, cert.NotAfter.After(now)
	return k
}
