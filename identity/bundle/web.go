package bundle

import (
	"crypto/tls"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"
)

// WebTLS returns the configuration of a bundle endpoint with the https_web profile (SPIFFE Federation §5.2.1): it presents the certificate in
// two PEM files, which it reads again when they change. While what is new does not load, the last good one is presented.
func WebTLS(certFile, keyFile string, log *slog.Logger) (*tls.Config, error) {
	w := &webCertificate{certFile: certFile, keyFile: keyFile, log: log}
	if err := w.load(); err != nil {
		return nil, err
	}
	return &tls.Config{MinVersion: tls.VersionTLS12, SessionTicketsDisabled: true, NextProtos: []string{"h2", "http/1.1"}, GetCertificate: w.get}, nil
}

type webCertificate struct {
	certFile, keyFile string // read-only
	log               *slog.Logger

	mu       sync.Mutex
	cert     *tls.Certificate // guarded by mu
	modified [2]time.Time     // guarded by mu; of what cert was, or could not be, read from
}

func (w *webCertificate) load() error {
	var modified [2]time.Time
	for i, name := range []string{w.certFile, w.keyFile} {
		info, err := os.Stat(name)
		if err != nil {
			return fmt.Errorf("certificate of the https_web bundle endpoint: %w", err)
		}
		modified[i] = info.ModTime()
	}
	if w.cert != nil && modified == w.modified {
		return nil
	}
	w.modified = modified
	cert, err := tls.LoadX509KeyPair(w.certFile, w.keyFile)
	if err != nil {
		return fmt.Errorf("certificate of the https_web bundle endpoint, %s and %s: %w", w.certFile, w.keyFile, err)
	}
	w.cert = &cert
	return nil
}

func (w *webCertificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if err := w.load(); err != nil {
		w.log.Error("the last good certificate is presented", "error", err)
	}
	return w.cert, nil
}
